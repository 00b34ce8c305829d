//! Keepalives of many leases on one stream.
//!
//! All sessions of a [`Transport`](super::transport::Transport) renew their leases through one stream to one member. Who
//! waits too long for an answer has the stream replaced by another, through the next member; the first stays open as
//! long as answers are due on it, and they count when they come.
//!
//! # Confirmation
//!
//! A keepalive is confirmed by a linearizable read begun after its answer that shows the same raft term. A leader that
//! was stopped and has been replaced still answers keepalives when it continues, until it hears of the new term; those
//! do not count, the new leader never saw them. One read confirms every answer that came before it began.

use std::collections::VecDeque;
use std::num::NonZeroI64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{
    Client, Error as EtcdError, GetOptions, LeaseKeepAliveResponse, LeaseKeepAliveStream, LeaseKeeper,
    ResponseHeader,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::rpc::{self, Failure, Rpc};
use super::runtime::Time;

/// How many keepalives may be unanswered on one stream: fewer than the client's queue holds, so that sending never
/// waits.
const UNANSWERED: usize = 64;

/// Sends the keepalives of all sessions of a transport.
#[derive(Debug)]
pub(crate) struct Keepalives {
    /// Connections of its own, so that no other traffic delays a keepalive.
    pub(crate) rpc: Arc<Rpc>,
    current: Mutex<Option<Stream>>,
    closing: CancellationToken,
}

/// A stream through one member; ends when nobody has it and no answer is due, or when it fails.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    member: usize,
    requests: UnboundedSender<Request>,
}

/// What came of one keepalive.
#[derive(Debug)]
pub(crate) enum Beat {
    /// Answered and confirmed.
    Confirmed(Renewal),
    /// etcd says that the lease is gone.
    Gone,
    /// No answer, or one that does not count.
    Nothing,
}

/// What a confirmed answer says.
#[derive(Debug)]
pub(crate) struct Renewal {
    /// When the keepalive was sent.
    pub(crate) sent: Time,
    /// The TTL in the answer.
    pub(crate) ttl: Duration,
}

#[derive(Debug)]
struct Request {
    lease: NonZeroI64,
    /// Dropped without an answer: [`Beat::Nothing`].
    answer: oneshot::Sender<Beat>,
}

/// A keepalive that was sent.
struct Sent {
    request: Request,
    at: Time,
}

/// A keepalive that was answered.
struct Answered {
    request: Request,
    renewal: Renewal,
    term: u64,
}

// === impl Keepalives ===

impl Keepalives {
    /// The task of the first stream runs at once; it connects when it has something to send.
    pub(crate) fn new(rpc: Arc<Rpc>, closing: CancellationToken) -> Self {
        let keepalives = Self { rpc, current: Mutex::default(), closing };
        keepalives.stream();
        keepalives
    }

    /// The stream in use; another is opened if it has ended.
    pub(crate) fn stream(&self) -> Stream {
        let mut current = self.current();
        match &*current {
            Some(stream) if !stream.requests.is_closed() => stream.clone(),
            _ => current.insert(self.open()).clone(),
        }
    }

    /// A stream other than `stream`, through another member if there is one.
    pub(crate) fn instead_of(&self, stream: &Stream) -> Stream {
        let mut current = self.current();
        if current.as_ref().is_some_and(|current| current.requests.same_channel(&stream.requests)) {
            *current = None;
            self.rpc.endpoints.avoid(stream.member);
        }
        drop(current);
        self.stream()
    }

    /// Renews a lease on a stream.
    pub(crate) async fn renew(&self, stream: &Stream, lease: NonZeroI64) -> Beat {
        let (answer, answered) = oneshot::channel();
        // When the stream has ended the request is dropped, and the answer with it.
        let _ = stream.requests.send(Request { lease, answer });
        match tokio::time::timeout(self.rpc.timeout * 2, answered).await {
            Ok(answered) => answered.unwrap_or(Beat::Nothing),
            Err(_) => Beat::Nothing,
        }
    }

    fn current(&self) -> MutexGuard<'_, Option<Stream>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> Stream {
        let (requests, inbox) = unbounded_channel();
        let member = self.rpc.endpoints.current();
        let task = Task { rpc: self.rpc.clone(), member, inbox, again: VecDeque::new() };
        let closing = self.closing.clone();
        self.rpc.runtime.spawn(async move {
            tokio::select! {
                biased;
                () = closing.cancelled() => {}
                () = task.run() => {}
            }
        });
        Stream { member, requests }
    }
}

/// The task of a stream.
struct Task {
    rpc: Arc<Rpc>,
    member: usize,
    inbox: UnboundedReceiver<Request>,
    /// Requests that came to nothing on a stream whose token was refused.
    again: VecDeque<Request>,
}

/// The open stream of a task.
struct Open {
    client: Client,
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
    /// Not answered.
    sent: VecDeque<Sent>,
    /// Not confirmed, and no read begun since.
    answered: Vec<Answered>,
    confirmation: Option<Confirmation>,
}

/// A read under way, and the answers that came before it began.
struct Confirmation {
    /// `None` when the read has no answer in time.
    term: BoxFuture<'static, Result<Option<u64>, EtcdError>>,
    answered: Vec<Answered>,
}

impl Task {
    /// Opens the stream for the first request and serves all until it fails or is not needed any more.
    async fn run(mut self) {
        while let Some(first) = self.next().await {
            let (begun, limit) = (Instant::now(), self.rpc.timeout * 2);
            let failed = match tokio::time::timeout(limit, self.open(first.lease)).await {
                Ok(Ok(mut open)) => match self.serve(&mut open, first).await {
                    Ok(()) => return,
                    Err(error) => {
                        self.again.extend(open.unconfirmed());
                        error
                    }
                },
                Ok(Err(EtcdError::LeaseKeepAliveError(message))) if message == "lease not found" => {
                    let _ = first.answer.send(Beat::Gone);
                    continue;
                }
                Ok(Err(error)) => {
                    self.again.push_back(first);
                    error
                }
                Err(_) => return tracing::debug!("no keepalive stream in time"),
            };
            match rpc::classify(b"the session's lease", failed, self.rpc.has_user) {
                Failure::Login(_) if self.rpc.renews_token(self.member, begun).await => continue,
                Failure::Refused(error) => tracing::warn!(error = ?error, "etcd refuses to renew the lease"),
                failure => tracing::debug!(?failure, "keepalive stream failed"),
            }
            return;
        }
    }

    async fn next(&mut self) -> Option<Request> {
        match self.again.pop_front() {
            Some(request) => Some(request),
            None => self.inbox.recv().await,
        }
    }

    async fn open(&self, lease: NonZeroI64) -> Result<Open, EtcdError> {
        let client = self.rpc.endpoints.client(self.member).await?.clone();
        let (keeper, answers) = client.lease_client().keep_alive(lease.get()).await?;
        let (sent, answered, confirmation) = (VecDeque::new(), Vec::new(), None);
        Ok(Open { client, keeper, answers, sent, answered, confirmation })
    }

    /// Sends, hears and confirms; fine when nobody needs the stream any more, or nothing came for too long.
    async fn serve(&mut self, open: &mut Open, first: Request) -> Result<(), EtcdError> {
        open.send(first, self.rpc.runtime.now()).await?;
        let (limit, mut wanted) = (self.rpc.timeout * 2, true);
        loop {
            let due = !open.sent.is_empty() || open.confirmation.is_some();
            if !wanted && !due {
                return Ok(());
            }
            let confirmed = async {
                match &mut open.confirmation {
                    Some(confirmation) => (&mut confirmation.term).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = open.answers.message() => match answer? {
                    Some(answer) => open.hear(&answer),
                    None => return Ok(()),
                },
                term = confirmed => {
                    let Some(term) = term? else { return Ok(()) };
                    if !open.confirmation.take().is_none_or(|confirmation| confirmation.settle(term)) {
                        tracing::debug!("a keepalive was answered by a leader of another term");
                        return Ok(());
                    }
                }
                request = self.next(), if wanted && open.sent.len() < UNANSWERED => match request {
                    Some(request) => open.send(request, self.rpc.runtime.now()).await?,
                    None => wanted = false,
                },
                () = tokio::time::sleep(limit), if due => return Ok(()),
            }
            if open.confirmation.is_none() && !open.answered.is_empty() {
                open.confirmation = Some(open.confirm(self.rpc.clone(), self.member));
            }
        }
    }
}

impl Open {
    async fn send(&mut self, request: Request, at: Time) -> Result<(), EtcdError> {
        if !request.answer.is_closed() {
            self.keeper.id = request.lease.get();
            self.keeper.keep_alive().await?;
            self.sent.push_back(Sent { request, at });
        }
        Ok(())
    }

    /// Takes in an answer. Those for one lease come in the order of the requests.
    fn hear(&mut self, message: &LeaseKeepAliveResponse) {
        let same = |sent: &Sent| sent.request.lease.get() == message.id();
        let Some(sent) = self.sent.iter().position(same).and_then(|at| self.sent.remove(at)) else { return };
        let Sent { request, at } = sent;
        match (u64::try_from(message.ttl()), message.header()) {
            (Ok(0) | Err(_), _) => {
                let _ = request.answer.send(Beat::Gone);
            }
            (Ok(ttl), Some(header)) => {
                let renewal = Renewal { sent: at, ttl: Duration::from_secs(ttl) };
                self.answered.push(Answered { request, renewal, term: header.raft_term() });
            }
            // Cannot be confirmed.
            (Ok(_), None) => {}
        }
    }

    /// The requests that nobody knows to have been done.
    fn unconfirmed(self) -> impl Iterator<Item = Request> {
        let answered = self.confirmation.into_iter().flat_map(|confirmation| confirmation.answered);
        let answered = answered.chain(self.answered).map(|answered| answered.request);
        answered.chain(self.sent.into_iter().map(|sent| sent.request))
    }

    /// Begins a read that confirms everything answered so far.
    fn confirm(&mut self, rpc: Arc<Rpc>, member: usize) -> Confirmation {
        let term = term(rpc, self.client.clone(), member);
        Confirmation { term: term.boxed(), answered: std::mem::take(&mut self.answered) }
    }
}

/// Reads the raft term of the leader behind a member. `None` if no answer comes in time.
async fn term(rpc: Arc<Rpc>, client: Client, member: usize) -> Result<Option<u64>, EtcdError> {
    let mut kv = client.kv_client();
    loop {
        let begun = Instant::now();
        let read = kv.get(rpc.probe.clone(), Some(GetOptions::new().with_count_only()));
        match tokio::time::timeout(rpc.timeout, read).await {
            Ok(Ok(read)) => return Ok(Some(read.header().map_or(0, ResponseHeader::raft_term))),
            Ok(Err(error)) => {
                if !rpc::is_token_refused(&error) || !rpc.renews_token(member, begun).await {
                    return Err(error);
                }
            }
            Err(_) => return Ok(None),
        }
    }
}

impl Confirmation {
    /// Tells everybody whose answer is of the same term; false if there is another.
    fn settle(self, term: u64) -> bool {
        let mut all = true;
        for Answered { request, renewal, term: answered } in self.answered {
            all &= answered == term;
            if answered == term {
                let _ = request.answer.send(Beat::Confirmed(renewal));
            }
        }
        all
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn answered(term: u64) -> (Answered, oneshot::Receiver<Beat>) {
        let (answer, beat) = oneshot::channel();
        let request = Request { lease: NonZeroI64::MIN, answer };
        let renewal = Renewal { sent: Time(1), ttl: Duration::from_secs(1) };
        (Answered { request, renewal, term }, beat)
    }

    fn confirmation(answered: Vec<Answered>) -> Confirmation {
        Confirmation { term: std::future::pending().boxed(), answered }
    }

    /// A leader that stood still answers until it hears of the one that took its place.
    #[test]
    fn an_answer_of_another_term_does_not_count() {
        let ((old, mut stale), (new, mut fresh)) = (answered(2), answered(3));
        assert!(!confirmation(vec![old, new]).settle(3), "the stream goes on");
        assert!(stale.try_recv().is_err());
        assert!(matches!(fresh.try_recv().unwrap(), Beat::Confirmed(_)));
    }

    #[test]
    fn a_read_of_an_older_leader_confirms_nothing() {
        let (new, mut beat) = answered(3);
        assert!(!confirmation(vec![new]).settle(2));
        assert!(beat.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_confirmation_is_not_waited_for_longer_than_any_attempt() {
        let (rpc, _silent) = Rpc::silent().await;
        let (client, limit) = (rpc.endpoints.client(0).await.unwrap().clone(), rpc.timeout * 2);
        let term = tokio::time::timeout(limit, term(Arc::new(rpc), client, 0)).await;
        assert!(matches!(term, Ok(Ok(None))), "{term:?}");
    }
}
