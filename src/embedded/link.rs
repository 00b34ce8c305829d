//! A client's way to an embedded server, which a test can cut, stall, or lay faults into.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use etcd_client::{Channel, Client};
use futures::future::BoxFuture;
use futures::stream::unfold;
use http_body_util::{BodyExt as _, Full, StreamBody};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::bytes::Bytes;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::{Code, Status};
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service};

type Request = http::Request<Body>;
type Response = http::Response<Body>;

/// One client's way to a [`Server`](super::Server). Clone it freely; all clones are the same way.
///
/// Everything a client sends over a link that is cut fails at once; over one that is stalled it waits, as over a network
/// that swallows packets. The server itself, and other links, know nothing of it.
#[derive(Clone)]
pub struct Link {
    shared: Arc<Shared>,
    routes: Routes,
}

struct Shared {
    way: Mutex<Way>,
    // Wakes in the order in which they came, which a `watch` does not.
    changed: Notify,
    faults: Mutex<Vec<Arc<Laid>>>,
    /// Ends with the server, and what is held back with it.
    closing: CancellationToken,
}

/// What becomes of messages.
#[derive(Debug, Clone, Copy, Default)]
struct Way {
    stalled: bool,
    cut: bool,
    /// How often it was cut: what was under way before is gone, even if it is open again.
    cuts: u64,
}

/// What is to happen to requests of one method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The request is not served; the client is told that the server is unavailable.
    Refuse,
    /// The request is served, and its answer lost: the client is told that the connection broke.
    LoseAnswer,
    /// The request is held back until [`Injection::release`], also when the client has given up meanwhile.
    Hold,
    /// The request is served and answered, and arrives a second time upon [`Injection::release`]. A stream arrives once.
    Twice,
}

/// A fault laid into a link; see [`Link::inject`].
#[derive(Debug, Clone)]
pub struct Injection {
    laid: Arc<Laid>,
}

#[derive(Debug)]
struct Laid {
    method: String,
    fault: Fault,
    left: AtomicUsize,
    hits: watch::Sender<usize>,
    released: CancellationToken,
}

impl Link {
    pub(super) fn new(routes: Routes, closing: CancellationToken) -> Self {
        let shared =
            Shared { way: Mutex::default(), changed: Notify::new(), faults: Mutex::default(), closing };
        Self { shared: Arc::new(shared), routes }
    }

    /// An etcd client over this link.
    ///
    /// # Errors
    ///
    /// None at present: nothing is sent.
    ///
    /// # Cancel safety
    ///
    /// Nothing remains when dropped.
    pub async fn client(&self) -> Result<Client, etcd_client::Error> {
        let channel = Channel::Custom(BoxCloneSyncService::new(self.clone()));
        Client::from_channel(channel, None).await
    }

    /// Breaks the connection: requests and streams under way fail, and so does all that comes until
    /// [`restore`](Link::restore).
    pub fn cut(&self) {
        self.shared.change(|way| *way = Way { stalled: false, cut: true, cuts: way.cuts + 1 });
    }

    /// Lets nothing through any more, either way; what is sent waits until [`restore`](Link::restore).
    pub fn stall(&self) {
        self.shared.change(|way| way.stalled = true);
    }

    /// Opens the link again.
    pub fn restore(&self) {
        self.shared.change(|way| *way = Way { stalled: false, cut: false, ..*way });
    }

    /// Lets the next `times` requests of a method meet a fault. The method is named as in etcd's API: `Txn`, `Range`,
    /// `LeaseGrant`, `LeaseKeepAlive`, `Watch`, …
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use etcd_recipes::Mutex;
    /// use etcd_recipes::embedded::{Fault, Server};
    ///
    /// let server = Server::start();
    /// let link = server.link();
    /// let session = server.session(&link).await?.connect().await?;
    /// let lost = link.inject("Txn", Fault::LoseAnswer, 1);
    /// // The lock is taken although the answer that says so never arrives.
    /// let guard = Mutex::new(&session, "reports")?.lock().await?;
    /// assert_eq!(lost.hits(), 1);
    /// guard.unlock().await?;
    /// # Ok(()) }
    /// ```
    pub fn inject(&self, method: &str, fault: Fault, times: usize) -> Injection {
        let laid = Arc::new(Laid {
            method: method.to_owned(),
            fault,
            left: AtomicUsize::new(times),
            hits: watch::Sender::new(0),
            released: CancellationToken::new(),
        });
        self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner).push(laid.clone());
        Injection { laid }
    }
}

impl Link {
    /// Lays no fault into requests to come any more. What is held back still is, until it is released.
    pub fn clear(&self) {
        self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Injection {
    /// How many requests met it.
    pub fn hits(&self) -> usize {
        *self.laid.hits.borrow()
    }

    /// Waits until `count` requests have met it.
    ///
    /// # Cancel safety
    ///
    /// Only waits.
    pub async fn hit(&self, count: usize) {
        // The sender lives as long as this.
        let _ = self.laid.hits.subscribe().wait_for(|hits| *hits >= count).await;
    }

    /// Lets go what is held back, and all that comes.
    pub fn release(&self) {
        self.laid.left.store(0, Ordering::SeqCst);
        self.laid.released.cancel();
    }
}

impl Shared {
    fn way(&self) -> Way {
        *self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Way)) {
        change(&mut self.way.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_waiters();
    }

    /// Waits until the way is as wanted.
    async fn until(&self, wanted: impl Fn(Way) -> bool) -> Way {
        loop {
            // Hears of everything from here on.
            let changed = self.changed.notified();
            let way = self.way();
            if wanted(way) {
                return way;
            }
            changed.await;
        }
    }

    /// The fault that a request of this method meets, if any.
    fn fault(&self, path: &str) -> Option<Arc<Laid>> {
        let method = path.rsplit('/').next().unwrap_or_default();
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.retain(|laid| laid.left.load(Ordering::SeqCst) > 0);
        let laid = faults.iter().find(|laid| laid.method == method)?.clone();
        laid.left.fetch_sub(1, Ordering::SeqCst);
        laid.hits.send_modify(|hits| *hits += 1);
        Some(laid)
    }
}

/// One exchange over a link.
#[derive(Clone)]
struct Passage {
    shared: Arc<Shared>,
    /// How often the link had been cut when it began.
    cuts: u64,
}

impl Passage {
    fn begin(shared: &Arc<Shared>) -> Self {
        Self { shared: shared.clone(), cuts: shared.way().cuts }
    }

    fn is_broken(&self, way: Way) -> bool {
        way.cut || way.cuts != self.cuts
    }

    /// Waits until messages pass.
    async fn pass(&self) -> Result<(), Status> {
        let way = self.shared.until(|way| !way.stalled || way.cuts != self.cuts).await;
        if self.is_broken(way) { Err(broken()) } else { Ok(()) }
    }

    /// Waits until the link is cut.
    async fn broken(&self) {
        self.shared.until(|way| self.is_broken(way)).await;
    }

    /// Lets the frames of a body pass, as long as the link is not cut.
    fn over(self, body: Body) -> Body {
        let frames = unfold(Some((body, self)), |state| async {
            let (mut body, passage) = state?;
            let frame = tokio::select! {
                biased;
                () = passage.broken() => Some(Err(broken())),
                frame = body.frame() => frame,
            };
            match (frame?, passage.pass().await) {
                (Ok(frame), Ok(())) => Some((Ok(frame), Some((body, passage)))),
                (Err(error), _) | (_, Err(error)) => Some((Err(error), None)),
            }
        });
        Body::new(StreamBody::new(frames))
    }
}

fn broken() -> Status {
    Status::new(Code::Unavailable, "the link is cut")
}

impl Service<Request> for Link {
    type Response = Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let (shared, routes) = (self.shared.clone(), self.routes.clone());
        Box::pin(async move {
            let passage = Passage::begin(&shared);
            passage.pass().await?;
            let inward = passage.clone();
            let request = request.map(|body| inward.over(body));
            let response = match shared.fault(request.uri().path()) {
                None => serve(routes, request).await,
                Some(laid) => laid.meet(&shared, routes, request).await?,
            };
            passage.pass().await?;
            Ok(response.map(|body| passage.over(body)))
        })
    }
}

async fn serve(mut routes: Routes, request: Request) -> Response {
    let served: Result<Response, Infallible> = routes.call(request).await;
    match served {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

impl Laid {
    async fn meet(
        self: Arc<Self>,
        shared: &Shared,
        routes: Routes,
        request: Request,
    ) -> Result<Response, BoxError> {
        match self.fault {
            Fault::Refuse => Err(Status::unavailable("refused by an injected fault").into()),
            Fault::LoseAnswer => {
                serve(routes, request).await;
                Err(Status::unavailable("the answer was lost by an injected fault").into())
            }
            Fault::Hold => {
                let request = if self.is_stream() { request } else { whole(request).await?.map(body) };
                self.late(shared, routes, request).await.ok().flatten().ok_or_else(|| broken().into())
            }
            Fault::Twice if self.is_stream() => Ok(serve(routes, request).await),
            Fault::Twice => {
                let request = whole(request).await?;
                self.late(shared, routes.clone(), request.clone().map(body));
                Ok(serve(routes, request.map(body)).await)
            }
        }
    }

    /// Its requests are never whole.
    fn is_stream(&self) -> bool {
        ["Watch", "LeaseKeepAlive"].contains(&self.method.as_str())
    }

    /// Serves a request once it is released: one on its way arrives also when nobody waits for the answer any more.
    fn late(
        self: Arc<Self>,
        shared: &Shared,
        routes: Routes,
        request: Request,
    ) -> JoinHandle<Option<Response>> {
        let closing = shared.closing.clone();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = self.released.cancelled() => Some(serve(routes, request).await),
                () = closing.cancelled() => None,
            }
        })
    }
}

/// A request as it arrives even if the link is cut meanwhile.
async fn whole(request: Request) -> Result<http::Request<Bytes>, BoxError> {
    let (parts, body) = request.into_parts();
    Ok(http::Request::from_parts(parts, body.collect().await?.to_bytes()))
}

fn body(bytes: Bytes) -> Body {
    Body::new(Full::new(bytes))
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("way", &self.shared.way()).finish_non_exhaustive()
    }
}
