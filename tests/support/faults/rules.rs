//! Which request meets which fault, and what a test learns of it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::bytes::Bytes;
use tonic::Status;

use super::Faults;
use crate::support::server::PATIENCE;

/// What happens to a request.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// It is not sent; the caller gets `Unavailable`.
    FailBefore,
    /// It is not sent; the caller gets this status.
    FailWith(Status),
    /// It is not sent; the caller never gets an answer.
    NeverSend,
    /// It is sent and takes effect, also when the caller goes away; its answer is thrown away and the caller
    /// gets `Unavailable` after that.
    LoseAnswer,
    /// As [`Fault::LoseAnswer`], with this status.
    LoseAnswerWith(Status),
    /// It is sent and takes effect, also when the caller goes away; the caller never gets an answer.
    NeverAnswer,
    /// It is sent late, also when the caller went away meanwhile. A caller that still waits gets the answer.
    Hold(Until),
    /// It is sent, also when the caller goes away; the caller gets the answer; later the same bytes are sent
    /// once more. Not for streams.
    Twice(Until),
}

/// When something held back goes on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Until {
    /// After this time.
    After(Duration),
    /// When the test calls [`Injection::release`].
    Released,
}

type Predicate = Box<dyn Fn(&[u8]) -> bool + Send>;

/// An armed fault.
pub(super) struct Rule {
    /// A method name such as `Txn`, a full path, or `*`.
    pub(super) method: String,
    /// Looks at the raw (first) message of the request.
    pub(super) predicate: Option<Predicate>,
    /// Matching requests to let through first.
    pub(super) skip: usize,
    /// Matching requests to hit.
    pub(super) times: usize,
    pub(super) fault: Fault,
    pub(super) record: Arc<Record>,
}

impl Rule {
    /// Whether it is about this path, such as `/etcdserverpb.KV/Txn`.
    pub(super) fn is_about(&self, path: &str) -> bool {
        self.method == "*" || self.method == path || path.rsplit('/').next() == Some(&self.method)
    }

    /// Whether it hits this request; counts it if so.
    pub(super) fn takes(&mut self, path: &str, message: &[u8]) -> bool {
        let matches = self.times > 0
            && self.is_about(path)
            && self.predicate.as_ref().is_none_or(|predicate| predicate(message));
        if !matches {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.times -= 1;
        self.record.hits.send_modify(|hits| *hits += 1);
        true
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { method, skip, times, fault, .. } = self;
        write!(f, "Rule({method}, skip {skip}, times {times}, {fault:?})")
    }
}

/// The requests a fault is armed for.
#[must_use = "nothing is armed before `inject`"]
pub(crate) struct Arm<'a> {
    pub(super) faults: &'a Faults,
    pub(super) method: String,
    pub(super) predicate: Option<Predicate>,
    pub(super) skip: usize,
    pub(super) times: usize,
}

impl Arm<'_> {
    /// Only requests whose raw (first) message contains these bytes, for example a key or a name.
    pub(crate) fn containing(self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref().to_vec();
        assert!(!bytes.is_empty(), "every message contains nothing");
        self.when(move |message| message.windows(bytes.len()).any(|window| window == bytes))
    }

    /// Only requests whose raw (first) message passes; conditions add up.
    pub(crate) fn when(mut self, predicate: impl Fn(&[u8]) -> bool + Send + 'static) -> Self {
        let before = self.predicate.take();
        self.predicate = Some(Box::new(move |message| {
            before.as_ref().is_none_or(|before| before(message)) && predicate(message)
        }));
        self
    }

    /// Lets the first `count` such requests through.
    pub(crate) fn skip(mut self, count: usize) -> Self {
        self.skip = count;
        self
    }

    /// Hits `count` such requests.
    pub(crate) fn times(mut self, count: usize) -> Self {
        self.times = count;
        self
    }

    /// Hits all such requests until [`Faults::clear`].
    pub(crate) fn always(self) -> Self {
        self.times(usize::MAX)
    }

    /// Arms the fault.
    pub(crate) fn inject(self, fault: Fault) -> Injection {
        let record = Record::new();
        let Self { faults, method, predicate, skip, times } = self;
        let rule = Rule { method, predicate, skip, times, fault, record: record.clone() };
        faults.rules().push(rule);
        Injection { record }
    }
}

/// What happened to the requests of one rule.
#[derive(Debug)]
pub(super) struct Record {
    hits: watch::Sender<usize>,
    answers: watch::Sender<Vec<Result<Bytes, Status>>>,
    released: watch::Sender<bool>,
}

impl Record {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            hits: watch::Sender::new(0),
            answers: watch::Sender::new(Vec::new()),
            released: watch::Sender::new(false),
        })
    }

    /// Keeps an answer the caller did not get.
    pub(super) fn keep(&self, answer: Result<Bytes, Status>) {
        self.answers.send_modify(|answers| answers.push(answer));
    }

    pub(super) async fn wait(&self, until: Until) {
        match until {
            Until::After(time) => tokio::time::sleep(time).await,
            Until::Released => {
                let _ = self.released.subscribe().wait_for(|released| *released).await;
            }
        }
    }
}

/// A test's handle on a fault it armed. Dropping it changes nothing.
#[derive(Debug, Clone)]
pub(crate) struct Injection {
    pub(super) record: Arc<Record>,
}

impl Injection {
    /// How many requests were hit so far.
    pub(crate) fn hits(&self) -> usize {
        *self.record.hits.borrow()
    }

    /// Waits until `count` requests were hit.
    pub(crate) async fn hit(&self, count: usize) {
        let mut hits = self.record.hits.subscribe();
        let wait = tokio::time::timeout(PATIENCE, hits.wait_for(|hits| *hits >= count));
        wait.await.expect("no request met the fault").expect("the fault is gone");
    }

    /// Waits until etcd answered `count` requests of this fault with answers no caller got (lost answers,
    /// never-sent answers, second copies, held requests whose caller went away), and returns all of those:
    /// the raw message or the error. For a stream the message is empty.
    pub(crate) async fn answered(&self, count: usize) -> Vec<Result<Bytes, Status>> {
        let mut answers = self.record.answers.subscribe();
        let wait = tokio::time::timeout(PATIENCE, answers.wait_for(|answers| answers.len() >= count));
        wait.await.expect("etcd did not answer").expect("the fault is gone").clone()
    }

    /// Lets everything held with [`Until::Released`] go, now and later.
    pub(crate) fn release(&self) {
        self.record.released.send_replace(true);
    }
}
