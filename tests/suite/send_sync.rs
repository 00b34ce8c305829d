//! Facts the compiler proves: what may cross threads.

use etcd_recipes::etcd_client::{Client, Compare, Txn, TxnResponse};
use etcd_recipes::service;
use etcd_recipes::{
    Claim, ConfigCache, ConfigChange, ConfigChanges, ConfigEntry, ConfigHandler, ConfigProblem,
    ConfigSnapshot, DeadLetter, DetachedLeadership, Election, Error, Item, Leader, Leadership, Mutex,
    MutexGuard, Observation, Observe, Participant, Queue, QueueBuilder, Result, Session, SessionBuilder,
    SessionState, TypedClaim, TypedQueue,
};
use futures::stream::StreamExt as _;

/// Accepts only what can be sent to, and shared with, other threads.
fn thread_safe<T: Send + Sync + 'static>() {}

/// Accepts only futures that a multi-threaded runtime can run, and fixes their outputs.
fn sendable<T>(_: impl Future<Output = T> + Send) {}

fn make<T>() -> T {
    unreachable!("never run, only compiled")
}

#[test]
fn every_public_type_is_send_and_sync() {
    thread_safe::<Session>();
    thread_safe::<SessionState>();
    thread_safe::<Mutex>();
    thread_safe::<MutexGuard>();
    thread_safe::<Election>();
    thread_safe::<Leadership>();
    thread_safe::<DetachedLeadership>();
    thread_safe::<Leader>();
    thread_safe::<Observation>();
    thread_safe::<Participant>();
    thread_safe::<Queue>();
    thread_safe::<QueueBuilder>();
    thread_safe::<TypedQueue<String>>();
    thread_safe::<Claim>();
    thread_safe::<TypedClaim<String>>();
    thread_safe::<Item>();
    thread_safe::<DeadLetter>();
    thread_safe::<ConfigCache>();
    thread_safe::<ConfigEntry>();
    thread_safe::<ConfigSnapshot>();
    thread_safe::<ConfigChange>();
    thread_safe::<ConfigChanges>();
    thread_safe::<ConfigHandler>();
    thread_safe::<ConfigProblem>();
    thread_safe::<Error>();
    thread_safe::<service::Services>();
    thread_safe::<service::Registration>();
    thread_safe::<service::Discovery>();
    thread_safe::<service::DiscoveryBuilder>();
    thread_safe::<service::Snapshot>();
    thread_safe::<service::Balancer>();
    thread_safe::<service::Pick>();
    fn sendable_type<T: Send + 'static>() {}
    sendable_type::<SessionBuilder>();
    sendable_type::<Observe>();
    fn unpin<T: Unpin>() {}
    unpin::<Observe>();
    unpin::<service::Changes>();
}

#[test]
fn handles_are_cloned_and_guards_are_not() {
    fn cloned<T: Clone>() {}
    cloned::<Session>();
    cloned::<Mutex>();
    cloned::<Election>();
    cloned::<Queue>();
    cloned::<TypedQueue<String>>();

    // A hold that could be cloned would be two. Were one of them `Clone`, both traits below would give it the
    // method, and the call would not compile.
    trait NotCloned<Marker> {
        fn check() {}
    }
    struct IfCloned;
    impl<T: ?Sized> NotCloned<()> for T {}
    impl<T: Clone> NotCloned<IfCloned> for T {}
    <MutexGuard as NotCloned<_>>::check();
    <Leadership as NotCloned<_>>::check();
    <Observe as NotCloned<_>>::check();
    <Claim as NotCloned<_>>::check();
}

#[test]
fn every_future_of_a_session_is_send() {
    let _ = || {
        sendable::<Result<Session>>(Session::connect(["a"]));
        sendable::<Result<Session>>(Session::with_client(make::<Client>()));
        sendable::<Result<Session>>(make::<SessionBuilder>().connect());
        sendable::<Result<Session>>(make::<Session>().beside());
        sendable::<Result<()>>(make::<Session>().close());
    };
}

#[test]
fn every_future_of_a_mutex_is_send() {
    let _ = || {
        let (mutex, guard) = (make::<Mutex>(), make::<MutexGuard>());
        sendable::<Result<MutexGuard>>(mutex.lock());
        sendable::<Result<Option<MutexGuard>>>(mutex.try_lock());
        sendable::<Result<Option<Participant>>>(mutex.holder());
        sendable::<Result<Vec<Participant>>>(mutex.waiters());
        sendable::<Result<TxnResponse>>(guard.txn(Txn::new()));
        sendable::<Result<u8>>(guard.run(async { 1 }));
        // The future of the loss does not borrow the guard.
        fn owned<F: Future<Output = ()> + Send + 'static>(_: F) {}
        owned(guard.lost());
        let _: Compare = guard.compare();
        sendable::<Result<()>>(guard.unlock());
    };
}

#[test]
fn every_future_of_a_config_cache_is_send() {
    let _ = || {
        let (session, config) = (make::<Session>(), make::<ConfigCache>());
        sendable::<Result<ConfigCache>>(ConfigCache::open(&session, "a"));
        sendable::<Result<()>>(config.ready());
        sendable::<Result<()>>(config.wait_for(1));
        sendable::<Result<i64>>(config.publish("a", "b"));
        sendable::<Result<i64>>(config.publish_as("a", "b"));
        sendable::<Result<Option<i64>>>(config.publish_if("a", 1, "b"));
        sendable::<Result<Option<i64>>>(config.delete("a"));
        sendable::<Result<Option<i64>>>(config.delete_if("a", 1));
        sendable::<Option<ConfigChange>>(config.changes("").next());
    };
}

#[test]
fn every_future_of_an_election_is_send() {
    let _ = || {
        let (election, leadership) = (make::<Election>(), make::<Leadership>());
        sendable::<Result<Leadership>>(election.campaign("value"));
        sendable::<Result<Option<Leader>>>(election.leader());
        sendable::<Result<Vec<Participant>>>(election.candidates());
        sendable::<Option<Result<Observation>>>(election.observe().next());
        let detached = make::<DetachedLeadership>();
        sendable::<Result<Option<Leadership>>>(election.resume(&detached));
        sendable::<Result<TxnResponse>>(leadership.txn(Txn::new()));
        sendable::<Result<u8>>(leadership.run(async { 1 }));
        sendable::<Result<()>>(leadership.proclaim("value"));
        fn owned<F: Future<Output = ()> + Send + 'static>(_: F) {}
        owned(leadership.lost());
        sendable::<Result<()>>(leadership.resign());
    };
}

#[test]
fn every_future_of_a_queue_is_send() {
    let _ = || {
        let (queue, mut claim) = (make::<Queue>(), make::<Claim>());
        sendable::<Result<i64>>(queue.enqueue("value"));
        sendable::<Result<i64>>(queue.enqueue_all(["value"]));
        sendable::<Result<Option<i64>>>(queue.try_enqueue("value"));
        sendable::<Result<Option<i64>>>(queue.enqueue_once("id", "value"));
        sendable::<Result<Item>>(queue.dequeue());
        sendable::<Result<Option<Item>>>(queue.try_dequeue());
        sendable::<Result<Claim>>(queue.claim());
        sendable::<Result<Option<Item>>>(queue.peek());
        sendable::<Result<u64>>(queue.length());
        sendable::<Result<Vec<DeadLetter>>>(queue.dead_letters());
        sendable::<Result<bool>>(queue.requeue(&make::<DeadLetter>()));
        sendable::<Result<bool>>(queue.purge(&make::<DeadLetter>()));
        fn owned<F: Future<Output = ()> + Send + 'static>(_: F) {}
        owned(claim.lost());
        let _: Compare = claim.compare();
        sendable::<Result<TxnResponse>>(claim.txn(Txn::new()));
        sendable::<Result<TxnResponse>>(claim.ack_with(Txn::new()));
        sendable::<Result<()>>(claim.ack());
        sendable::<Result<()>>(make::<Claim>().release(std::time::Duration::ZERO));
        sendable::<Result<()>>(make::<Claim>().reject("reason"));
        let typed = make::<TypedQueue<String>>();
        sendable::<Result<i64>>(typed.enqueue(&String::new()));
        sendable::<Result<i64>>(typed.enqueue_all(&[]));
        sendable::<Result<TypedClaim<String>>>(typed.claim());
        sendable::<Result<String>>(typed.dequeue());
    };
}
