//! A gRPC channel whose calls go to the instances of a service.

mod body;
mod peer;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{BoxFuture, Service, StdError};
use tonic::transport::Endpoint;

use self::body::{Counted, Unsent};
use self::peer::{Peer, causes, chain};
use super::{Balancer, Discovery, Instance, Policy};

/// How an instance is connected to.
type Connect = dyn Fn(&Instance) -> Result<Endpoint, tonic::transport::Error> + Send + Sync;

/// The options of a [`ServiceChannel`]; see [`Discovery::channel`].
#[must_use = "a builder does nothing until `build` is called"]
pub struct ChannelBuilder {
    discovery: Discovery,
    balancer: Balancer,
    connect: Box<Connect>,
}

impl Discovery {
    /// Begins a gRPC channel whose calls go to the instances that are discovered.
    #[cfg_attr(docsrs, doc(cfg(feature = "tonic")))]
    pub fn channel(&self) -> ChannelBuilder {
        let balancer = Balancer::new(Policy::RoundRobin);
        ChannelBuilder { discovery: self.clone(), balancer, connect: Box::new(plain) }
    }
}

/// Without TLS.
fn plain(instance: &Instance) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{}", instance.address))?;
    Ok(endpoint
        .connect_timeout(Duration::from_secs(2))
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(3)))
}

impl ChannelBuilder {
    /// Chooses the instance of each call. Defaults to [`Policy::RoundRobin`].
    pub fn balancer(mut self, balancer: Balancer) -> Self {
        self.balancer = balancer;
        self
    }

    /// Says how to connect to an instance. Defaults to its address without TLS, 2 seconds to connect, and HTTP/2
    /// keepalives during calls.
    ///
    /// # Examples
    ///
    /// With TLS; the names in the certificates are those of the instances here. The crate `tonic` needs one of its TLS
    /// features for it.
    ///
    /// ```no_run
    /// # use etcd_recipes::service::{Discovery, Instance, ServiceChannel};
    /// # fn example(discovery: Discovery, ca: tonic::transport::Certificate) -> ServiceChannel {
    /// use tonic::transport::{ClientTlsConfig, Endpoint};
    ///
    /// let secure = move |instance: &Instance| {
    ///     let tls = ClientTlsConfig::new().ca_certificate(ca.clone());
    ///     Endpoint::from_shared(format!("https://{}", instance.address))?.tls_config(tls)
    /// };
    /// discovery.channel().endpoint(secure).build()
    /// # }
    /// ```
    pub fn endpoint(
        mut self,
        connect: impl Fn(&Instance) -> Result<Endpoint, tonic::transport::Error> + Send + Sync + 'static,
    ) -> Self {
        self.connect = Box::new(connect);
        self
    }

    /// Makes the channel. Nothing is connected before the first call.
    pub fn build(self) -> ServiceChannel {
        let Self { discovery, balancer, connect } = self;
        let peers = Mutex::default();
        ServiceChannel { shared: Arc::new(Shared { discovery, balancer, connect, peers }) }
    }
}

impl std::fmt::Debug for ChannelBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChannelBuilder").field("discovery", &self.discovery).finish_non_exhaustive()
    }
}

/// A gRPC channel whose calls go to the instances of a service; give it to a client that `tonic` generated. Cheap to
/// clone.
///
/// Each call is given to an instance that is registered now, over a connection that stays open. An instance that cannot
/// be connected to, or whose connection breaks, rests for a while, and the next calls go to others.
///
/// A call that was certainly not sent is given to another instance by itself. One that was under way when its
/// connection broke fails with [`Unavailable`](tonic::Code::Unavailable): it may have been done, so only the caller can
/// say whether to send it again. Send it again, and another instance gets it.
///
/// Without any instance calls fail with `Unavailable` at once; see [`Discovery::ready`].
///
/// # Examples
///
/// ```no_run
/// # async fn example(session: etcd_recipes::Session) -> etcd_recipes::Result<()> {
/// use etcd_recipes::service::{Balancer, Policy, Services};
///
/// let discovery = Services::new(&session).discover("courseware").open().await?;
/// let balancer = Balancer::new(Policy::WeightedRoundRobin);
/// let channel = discovery.channel().balancer(balancer).build();
/// // let client = CoursewareClient::new(channel);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct ServiceChannel {
    shared: Arc<Shared>,
}

struct Shared {
    discovery: Discovery,
    balancer: Balancer,
    connect: Box<Connect>,
    /// The connections, by the ids of the instances.
    peers: Mutex<HashMap<String, Arc<Peer>>>,
}

impl Shared {
    /// The connection to an instance. Those to instances that are gone are given up, once their calls are through.
    fn peer(&self, instance: &Instance, present: &[Arc<Instance>]) -> Arc<Peer> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.len() > present.len() || !peers.contains_key(&instance.id) {
            peers.retain(|id, _| present.binary_search_by(|present| present.id.as_str().cmp(id)).is_ok());
        }
        let peer = peers.get(&instance.id).filter(|peer| peer.address() == instance.address);
        if let Some(peer) = peer {
            return peer.clone();
        }
        let peer = Peer::new(&instance.address);
        peers.insert(instance.id.clone(), peer.clone());
        peer
    }

    async fn call(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let mut body = Some(body);
        let tries = self.discovery.snapshot().instances.len().max(1);
        let mut last = None;
        for _ in 0..=tries {
            let snapshot = self.discovery.snapshot();
            let Some(pick) = self.balancer.pick(&snapshot.instances) else { break };
            let address = pick.instance().address.clone();
            let peer = self.peer(pick.instance(), &snapshot.instances);
            let runtime = self.discovery.runtime();
            let connection = match peer.connect(runtime, || (self.connect)(pick.instance())).await {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::debug!(service = self.discovery.service(), address, error, "cannot connect");
                    pick.failed();
                    last = Some(format!("cannot connect to {address}: {error}"));
                    continue;
                }
            };
            let Some(whole) = body.take() else { break };
            let (unsent, sent) = Unsent::new(whole);
            let error = match connection.call(Request::from_parts(head.clone(), sent)).await {
                Ok(answer) => {
                    return Ok(answer.map(|body| Counted::body(body, pick, peer, connection.number())));
                }
                Err(error) => StdError::from(error),
            };
            if find::<tonic::TimeoutExpired>(&error) {
                return Err(Status::from_error(error));
            }
            peer.disconnect(connection.number());
            pick.failed();
            let told = causes(&*error);
            tracing::debug!(service = self.discovery.service(), address, error = told, "connection lost");
            last = Some(format!("lost the connection to {address}: {told}"));
            // The connection was gone before the call, and nothing of it was sent.
            body = unsent.take().filter(|_| find::<tonic::ConnectError>(&error));
            if body.is_none() {
                break;
            }
        }
        let none = || format!("no instance of {} is registered", self.discovery.service());
        Err(Status::unavailable(last.unwrap_or_else(none)))
    }
}

/// Whether an error, or what caused it, is of this type.
fn find<E: std::error::Error + 'static>(error: &StdError) -> bool {
    chain(&**error).any(|error| error.is::<E>())
}

impl Service<Request<Body>> for ServiceChannel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = BoxFuture<Response<Body>, Status>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let shared = self.shared.clone();
        Box::pin(async move { shared.call(request).await })
    }
}

impl std::fmt::Debug for ServiceChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServiceChannel").field("discovery", &self.shared.discovery).finish_non_exhaustive()
    }
}
