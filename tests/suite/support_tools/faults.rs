//! Each fault does what it says, verified by reading etcd.

use std::time::{Duration, Instant};

use etcd_client::{Client, Compare, CompareOp, Error, PutOptions, Txn, TxnOp};
use tonic::{Code, Status};

use crate::support::check::{Scope, eventually, scoped};
use crate::support::faults::{Fault, Faults, Until};
use crate::support::server::PATIENCE;

const SHORT: Duration = Duration::from_millis(150);

/// A channel with faults to the scope's server and a client of it.
async fn faulty(scope: &Scope) -> (Faults, Client) {
    let faults = Faults::new(scope.endpoint());
    let client = faults.client().await;
    (faults, client)
}

fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> Code {
    match result.unwrap_err() {
        Error::GRpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

/// A key's value and how often it was written.
async fn read(scope: &Scope, key: &str) -> Option<(String, i64)> {
    let answer = scope.client().get(key, None).await.unwrap();
    answer.kvs().first().map(|kv| (kv.value_str().unwrap().to_owned(), kv.version()))
}

async fn written(scope: &Scope, key: &str, value: &str, version: i64) -> bool {
    read(scope, key).await == Some((value.to_owned(), version))
}

async fn clean(scope: &Scope) {
    let options = etcd_client::DeleteOptions::new().with_prefix();
    scope.client().delete(scope.name(), Some(options)).await.unwrap();
}

/// Creates a key if it is absent.
fn create(key: &str, value: &str) -> Txn {
    Txn::new()
        .when([Compare::create_revision(key, CompareOp::Equal, 0)])
        .and_then([TxnOp::put(key, value, None)])
}

#[tokio::test]
async fn fails_before_sending() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let key = scope.key("k");
        faults.next("Put", Fault::FailBefore);
        assert_eq!(code(client.put(key.as_str(), "1", None).await), Code::Unavailable);
        faults.next("Put", Fault::FailWith(Status::resource_exhausted("etcdserver: no space")));
        assert_eq!(code(client.put(key.as_str(), "1", None).await), Code::ResourceExhausted);
        faults.next("Put", Fault::NeverSend);
        assert!(tokio::time::timeout(SHORT, client.put(key.as_str(), "1", None)).await.is_err());
        assert_eq!(read(scope, &key).await, None);
        client.put(key.as_str(), "2", None).await.unwrap();
        assert!(written(scope, &key, "2", 1).await);
        assert_eq!((faults.calls("Put"), faults.calls("Txn")), (4, 0));
        clean(scope).await;
    })
    .await;
}

#[tokio::test]
async fn loses_the_answer_after_the_commit() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let key = scope.key("k");
        let lost = faults.next("Txn", Fault::LoseAnswer);
        // The commit comes before the error, so it can be read without waiting.
        assert_eq!(code(client.txn(create(&key, "1")).await), Code::Unavailable);
        assert!(written(scope, &key, "1", 1).await);
        assert_eq!(lost.hits(), 1);
        assert!(lost.answered(1).await[0].is_ok());
        assert!(!client.txn(create(&key, "2")).await.unwrap().succeeded());

        let status = Status::unavailable("etcdserver: request timed out");
        faults.next("/etcdserverpb.KV/Put", Fault::LoseAnswerWith(status));
        let error = client.put(key.as_str(), "3", None).await.unwrap_err();
        assert!(error.to_string().contains("request timed out"), "{error}");
        assert!(written(scope, &key, "3", 2).await);

        let never = faults.next("Put", Fault::NeverAnswer);
        assert!(tokio::time::timeout(SHORT, client.put(key.as_str(), "4", None)).await.is_err());
        never.answered(1).await[0].as_ref().unwrap();
        assert!(written(scope, &key, "4", 3).await);
        clean(scope).await;
    })
    .await;
}

#[tokio::test]
async fn keeps_the_answer_of_a_refused_request() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let lost = faults.next("Put", Fault::LoseAnswer);
        let options = PutOptions::new().with_lease(0x0dea_d1ea_5e00);
        assert_eq!(code(client.put(scope.key("k"), "1", Some(options)).await), Code::Unavailable);
        let answers = lost.answered(1).await;
        assert_eq!(answers[0].as_ref().unwrap_err().code(), Code::NotFound);
    })
    .await;
}

#[tokio::test]
async fn loses_the_answer_of_a_grant() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let id = i64::from(fastrand::u32(1..)) << 20;
        faults.next("LeaseGrant", Fault::LoseAnswer);
        let options = etcd_client::LeaseGrantOptions::new().with_id(id);
        assert_eq!(code(client.lease_grant(60, Some(options)).await), Code::Unavailable);
        scope.owns_lease(id);
        let granted = scope.client().leases().await.unwrap();
        assert!(granted.leases().iter().any(|lease| lease.id() == id));
        client.lease_revoke(id).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn sends_a_held_request_although_the_caller_left() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let key = scope.key("k");
        let held = faults.next("Put", Fault::Hold(Until::Released));
        assert!(tokio::time::timeout(SHORT, client.put(key.as_str(), "late", None)).await.is_err());
        assert_eq!((held.hits(), read(scope, &key).await), (1, None));
        client.put(key.as_str(), "early", None).await.unwrap();
        held.release();
        held.answered(1).await[0].as_ref().unwrap();
        assert!(written(scope, &key, "late", 2).await);

        // A caller that waits gets the answer, not before the time.
        let delay = Duration::from_millis(100);
        faults.next("Put", Fault::Hold(Until::After(delay)));
        let begin = Instant::now();
        client.put(key.as_str(), "on time", None).await.unwrap();
        assert!(begin.elapsed() >= delay);
        assert!(written(scope, &key, "on time", 3).await);
        clean(scope).await;
    })
    .await;
}

#[tokio::test]
async fn sends_twice() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let key = scope.key("k");
        let copy = faults.next("Put", Fault::Twice(Until::Released));
        client.put(key.as_str(), "first", None).await.unwrap();
        client.put(key.as_str(), "between", None).await.unwrap();
        copy.release();
        copy.answered(1).await[0].as_ref().unwrap();
        assert!(written(scope, &key, "first", 3).await);

        let copy = faults.next("Put", Fault::Twice(Until::After(Duration::from_millis(1))));
        client.put(key.as_str(), "again", None).await.unwrap();
        copy.answered(1).await[0].as_ref().unwrap();
        assert!(written(scope, &key, "again", 5).await);
        clean(scope).await;
    })
    .await;
}

#[tokio::test]
async fn hits_the_requests_it_is_armed_for() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let (a, b) = (scope.key("a"), scope.key("b"));
        let armed = faults.on("Put").containing(&b).skip(1).times(2).inject(Fault::FailBefore);
        client.put(a.as_str(), "1", None).await.unwrap();
        client.put(b.as_str(), "1", None).await.unwrap();
        let mut waiter = client.clone();
        let key = b.clone();
        let (_, result) =
            tokio::join!(armed.hit(1), async move { waiter.put(key.as_str(), "2", None).await });
        assert_eq!(code(result), Code::Unavailable);
        client.put(a.as_str(), "2", None).await.unwrap();
        assert_eq!(code(client.put(b.as_str(), "3", None).await), Code::Unavailable);
        client.put(b.as_str(), "4", None).await.unwrap();
        assert_eq!(armed.hits(), 2);
        assert!(written(scope, &b, "4", 2).await);

        faults.on("*").when(|message| !message.is_empty()).always().inject(Fault::FailBefore);
        assert_eq!(code(client.get(a.as_str(), None).await), Code::Unavailable);
        assert_eq!(code(client.put(a.as_str(), "5", None).await), Code::Unavailable);
        faults.clear();
        client.put(a.as_str(), "6", None).await.unwrap();
        clean(scope).await;
    })
    .await;
}

#[tokio::test]
async fn errors_of_etcd_come_through() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        // Also when the request is looked at.
        faults.on("Put").containing("something else").inject(Fault::FailBefore);
        let options = PutOptions::new().with_lease(0x0dea_d1ea_5e01);
        let error = client.put(scope.key("k"), "1", Some(options)).await.unwrap_err();
        assert!(error.to_string().contains("requested lease not found"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn swallows_messages_in_streams() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let key = scope.key("k");
        let mut watch = client.watch(key.as_str(), None).await.unwrap();
        assert!(watch.message().await.unwrap().unwrap().created());
        faults.swallow_answers("Watch", 1);
        let mut direct = scope.client();
        direct.put(key.as_str(), "swallowed", None).await.unwrap();
        // Messages arrive when the caller reads.
        tokio::select! {
            answer = watch.message() => panic!("not swallowed: {answer:?}"),
            () = eventually(PATIENCE, "the event arrives", async || faults.messages_received("Watch") == 2) => {}
        }
        direct.put(key.as_str(), "seen", None).await.unwrap();
        let answer = watch.message().await.unwrap().unwrap();
        assert_eq!(answer.events()[0].kv().unwrap().value(), b"seen");

        let lease = direct.lease_grant(60, None).await.unwrap().id();
        scope.owns_lease(lease);
        let (mut keeper, mut renewals) = client.lease_keep_alive(lease).await.unwrap();
        let begin = faults.messages_sent("LeaseKeepAlive");
        faults.swallow_requests("LeaseKeepAlive", 1);
        keeper.keep_alive().await.unwrap();
        eventually(PATIENCE, "the renewal is swallowed", async || {
            faults.messages_sent("LeaseKeepAlive") == begin + 1
        })
        .await;
        assert!(tokio::time::timeout(SHORT, renewals.message()).await.is_err());
        keeper.keep_alive().await.unwrap();
        assert_eq!(renewals.message().await.unwrap().unwrap().ttl(), 60);
        assert_eq!((faults.calls("Watch"), faults.calls("LeaseKeepAlive")), (1, 1));
        direct.lease_revoke(lease).await.unwrap();
        clean(scope).await;
    })
    .await;
}

#[tokio::test]
async fn holds_messages_in_streams_back() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let key = scope.key("k");
        let mut watch = client.watch(key.as_str(), None).await.unwrap();
        assert!(watch.message().await.unwrap().unwrap().created());
        faults.hold_answers("Watch", true);
        scope.client().put(key.as_str(), "held", None).await.unwrap();
        tokio::select! {
            answer = watch.message() => panic!("not held: {answer:?}"),
            () = eventually(PATIENCE, "the event arrives", async || faults.messages_received("Watch") == 2) => {}
        }
        assert!(tokio::time::timeout(SHORT, watch.message()).await.is_err());
        faults.hold_answers("Watch", false);
        let answer = watch.message().await.unwrap().unwrap();
        assert_eq!(answer.events()[0].kv().unwrap().value(), b"held");
        clean(scope).await;
    })
    .await;
}

#[tokio::test]
async fn faults_at_the_opening_of_streams() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let key = scope.key("k");
        faults.on("Watch").containing(&key).inject(Fault::FailBefore);
        assert_eq!(code(client.watch(key.as_str(), None).await), Code::Unavailable);
        let lost = faults.next("Watch", Fault::LoseAnswer);
        assert_eq!(code(client.watch(key.as_str(), None).await), Code::Unavailable);
        lost.answered(1).await[0].as_ref().unwrap();

        // A watch that opens late misses what happened before, unless it asks for it.
        let held = faults.next("Watch", Fault::Hold(Until::Released));
        let mut opener = client.clone();
        let late = key.clone();
        let open = tokio::spawn(async move { opener.watch(late.as_str(), None).await });
        held.hit(1).await;
        scope.client().put(key.as_str(), "missed", None).await.unwrap();
        held.release();
        let mut watch = open.await.unwrap().unwrap();
        assert!(watch.message().await.unwrap().unwrap().created());
        scope.client().put(key.as_str(), "seen", None).await.unwrap();
        let answer = watch.message().await.unwrap().unwrap();
        assert_eq!(answer.events()[0].kv().unwrap().value(), b"seen");
        clean(scope).await;
    })
    .await;
}

#[tokio::test]
async fn ends_the_streams_there_are() {
    scoped(async |scope| {
        let (faults, mut client) = faulty(scope).await;
        let key = scope.key("k");
        let mut watch = client.watch(key.as_str(), None).await.unwrap();
        assert!(watch.message().await.unwrap().unwrap().created());
        faults.end_streams("Watch", Status::aborted("ended"));
        assert_eq!(code(watch.message().await), Code::Aborted);
        assert!(watch.message().await.unwrap().is_none());

        let mut watch = client.watch(key.as_str(), None).await.unwrap();
        assert!(watch.message().await.unwrap().unwrap().created());
        scope.client().put(key.as_str(), "seen", None).await.unwrap();
        let answer = watch.message().await.unwrap().unwrap();
        assert_eq!(answer.events()[0].kv().unwrap().value(), b"seen");
        clean(scope).await;
    })
    .await;
}
