//! Facts the compiler proves: what may cross threads.

use etcd_recipes::etcd_client::{Client, Compare, Txn, TxnResponse};
use etcd_recipes::{
    DetachedLeadership, Election, Error, Leader, Leadership, Mutex, MutexGuard, Observation, Observe,
    Participant, Result, Session, SessionBuilder, SessionState,
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
    thread_safe::<Error>();
    fn sendable_type<T: Send + 'static>() {}
    sendable_type::<SessionBuilder>();
    sendable_type::<Observe>();
    fn unpin<T: Unpin>() {}
    unpin::<Observe>();
}

#[test]
fn handles_are_cloned_and_guards_are_not() {
    fn cloned<T: Clone>() {}
    cloned::<Session>();
    cloned::<Mutex>();
    cloned::<Election>();

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
}

#[test]
fn every_future_of_a_session_is_send() {
    let _ = || {
        sendable::<Result<Session>>(Session::connect(["a"]));
        sendable::<Result<Session>>(Session::with_client(make::<Client>()));
        sendable::<Result<Session>>(make::<SessionBuilder>().connect());
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
