//! A write whose first request has no answer and whose next is refused: it says what became of it.

use std::time::Duration;

use etcd_client::{Txn, TxnOp};
use etcd_recipes::service::Instance;
use etcd_recipes::{ConfigCache, Error, Queue, Result};
use tonic::Status;

use super::{PATIENCE, Rig, side_by_side};
use crate::service_registration::services;
use crate::support::check::{Scope, eventually, scoped};
use crate::support::faults::{Fault, Until};

/// What becomes of the first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum First {
    Applied,
    Lost,
    /// It arrives when everything is over.
    Late,
}

const FIRSTS: [First; 3] = [First::Applied, First::Lost, First::Late];

/// What is in all that is written here.
const VALUE: &str = "a value unlike all others";

impl First {
    fn fault(self) -> Fault {
        match self {
            Self::Applied => Fault::LoseAnswer,
            Self::Lost => Fault::FailBefore,
            Self::Late => Fault::Hold(Until::Released),
        }
    }

    /// Runs a write of [`VALUE`] whose permission is taken away after its first request.
    async fn befalls<T: std::fmt::Debug>(self, rig: &Rig<'_>, write: impl Future<Output = Result<T>>) {
        let arm = || rig.faults.on("Txn").containing(VALUE);
        let first = arm().inject(self.fault());
        let denied = arm().always().inject(Fault::FailWith(denied()));
        let written = write.await;
        assert!(denied.hits() > 0, "it was not sent again");
        match self {
            Self::Applied => assert!(written.is_ok(), "{self:?}: {written:?}"),
            Self::Lost | Self::Late => {
                assert!(matches!(written, Err(Error::PermissionDenied { .. })), "{self:?}: {written:?}");
            }
        }
        first.release();
        if self == Self::Late {
            first.answered(1).await;
        }
        rig.faults.clear();
        assert_eq!(times(rig.scope).await, usize::from(self == Self::Applied), "{self:?}");
    }
}

/// What an etcd says that looks into nested transactions; older ones allow too much.
fn denied() -> Status {
    Status::permission_denied("etcdserver: permission denied")
}

/// How many keys have it in their value.
async fn times(scope: &Scope) -> usize {
    let options = etcd_client::GetOptions::new().with_prefix();
    let found = scope.client().get(scope.name(), Some(options)).await.unwrap();
    found
        .kvs()
        .iter()
        .filter(|kv| kv.value().windows(VALUE.len()).any(|part| part == VALUE.as_bytes()))
        .count()
}

async fn remove(scope: &Scope, key: &str) {
    scope.client().delete(key, None).await.unwrap();
}

#[test]
fn an_enqueue_tells() {
    side_by_side(FIRSTS, async |scope, first| {
        let rig = Rig::new(scope, "queue").await;
        let queue = Queue::new(&rig.session, &rig.name).unwrap();
        first.befalls(&rig, queue.enqueue(VALUE)).await;
        while queue.try_dequeue().await.unwrap().is_some() {}
        drop(queue);
        rig.close().await;
    });
}

#[test]
fn a_guarded_transaction_tells() {
    side_by_side(FIRSTS, async |scope, first| {
        let rig = Rig::new(scope, "lock").await;
        let guard = rig.mutex().lock().await.unwrap();
        let key = scope.key("written");
        let write = Txn::new().and_then([TxnOp::put(key.as_str(), VALUE, None)]);
        first.befalls(&rig, guard.txn(write)).await;
        assert!(guard.is_held());
        guard.unlock().await.unwrap();
        remove(scope, &key).await;
        rig.close().await;
    });
}

#[test]
fn an_ack_with_a_transaction_tells() {
    side_by_side(FIRSTS, async |scope, first| {
        let rig = Rig::new(scope, "queue").await;
        let queue = Queue::new(&rig.session, &rig.name).unwrap();
        queue.enqueue("item").await.unwrap();
        let mut claim = queue.claim().await.unwrap();
        let key = scope.key("written");
        let write = Txn::new().and_then([TxnOp::put(key.as_str(), VALUE, None)]);
        first.befalls(&rig, claim.ack_with(write)).await;
        // Refused, it is still held.
        assert_eq!(claim.is_held(), first != First::Applied);
        if first != First::Applied {
            claim.ack().await.unwrap();
        }
        assert_eq!(queue.length().await.unwrap(), 0);
        remove(scope, &key).await;
        drop(queue);
        rig.close().await;
    });
}

#[test]
fn a_publication_tells() {
    side_by_side(FIRSTS, async |scope, first| {
        let rig = Rig::new(scope, "config").await;
        let config = ConfigCache::open(&rig.session, &rig.name).await.unwrap();
        first.befalls(&rig, config.publish("key", VALUE)).await;
        remove(scope, &format!("{}/key", rig.name)).await;
        drop(config);
        rig.close().await;
    });
}

#[test]
fn a_registration_tells() {
    side_by_side(FIRSTS, async |scope, first| {
        let rig = Rig::new(scope, "service").await;
        let services = services(scope, &rig.session);
        let instance = || Instance::new("courseware", "127.0.0.1:8400").id("a").metadata("what", VALUE);
        first.befalls(&rig, services.register(instance())).await;
        rig.close().await;
    });
}

/// The op slot went with the lease, so it cannot tell: what is certain is that nothing was promised.
#[tokio::test]
async fn a_write_on_a_lease_that_was_revoked_is_not_called_done() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "lock").await;
        let guard = rig.mutex().lock().await.unwrap();
        // Nobody tells the session.
        rig.faults.hold_answers("Watch", true);
        scope.client().lease_revoke(rig.session.lease_id().unwrap()).await.unwrap();
        let arm = || rig.faults.on("Txn").containing(VALUE);
        arm().inject(Fault::FailBefore);
        arm().always().inject(Fault::FailWith(denied()));
        let key = scope.key("written");
        let written = guard.txn(Txn::new().and_then([TxnOp::put(key.as_str(), VALUE, None)])).await;
        assert!(matches!(written, Err(Error::OutcomeUnknown { .. } | Error::Lost { .. })), "{written:?}");
        assert!(!guard.is_held());
        assert_eq!(times(scope).await, 0);
        drop(guard);
        rig.close().await;
    })
    .await;
}

/// Registrations that are sent together stand for themselves.
#[tokio::test]
async fn a_registration_that_is_refused_does_not_concern_the_others() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "service").await;
        let services = services(scope, &rig.session);
        let register = |id: &str| services.register(Instance::new("courseware", "127.0.0.1:8400").id(id));
        let refused = rig.faults.on("Txn").containing("/refused").always().inject(Fault::FailWith(denied()));
        let (one, bad, other) = tokio::join!(register("one"), register("refused"), register("other"));
        assert!(one.is_ok() && other.is_ok(), "{one:?} {other:?}");
        assert!(matches!(bad, Err(Error::PermissionDenied { .. })), "{bad:?}");
        assert_eq!(refused.hits(), 2, "they were not sent together");
        drop((one, bad, other));
        rig.close().await;
    })
    .await;
}

/// What was refused is not tried again when the registration has to come back.
#[tokio::test]
async fn after_a_refused_update_the_last_good_state_comes_back() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "service").await;
        let services = services(scope, &rig.session);
        let registration =
            services.register(Instance::new("courseware", "127.0.0.1:8400").id("a")).await.unwrap();
        rig.faults.on("Txn").containing(VALUE).always().inject(Fault::FailWith(denied()));
        let updated = registration.update(|instance| instance.version = VALUE.into()).await;
        assert!(matches!(updated, Err(Error::PermissionDenied { .. })), "{updated:?}");
        assert_ne!(registration.instance().version, VALUE);
        // The same when nobody waits for the answer.
        let mut given_up = Box::pin(registration.update(|instance| instance.version = VALUE.into()));
        assert!(futures::poll!(&mut given_up).is_pending());
        drop(given_up);
        let last_good = async || registration.instance().version != VALUE;
        eventually(PATIENCE, "it shows the last good state", last_good).await;
        remove(scope, &scope.key("courseware/a")).await;
        let back = async || scope.keys().await.contains(&scope.key("courseware/a"));
        eventually(PATIENCE, "it is back", back).await;
        assert_eq!(times(scope).await, 0);
        registration.deregister().await.unwrap();
        rig.close().await;
    })
    .await;
}

/// However often it is updated meanwhile.
#[tokio::test]
async fn a_registration_that_is_refused_comes_back_at_one_pace() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "service").await;
        let services = services(scope, &rig.session);
        let registration =
            services.register(Instance::new("courseware", "127.0.0.1:8400").id("a")).await.unwrap();
        let refused =
            rig.faults.on("Txn").containing("courseware/a").always().inject(Fault::FailWith(denied()));
        remove(scope, &scope.key("courseware/a")).await;
        refused.hit(1).await;
        for weight in 0..30 {
            let updated = registration.update(|instance| instance.weight = weight).await;
            assert!(matches!(updated, Err(Error::PermissionDenied { .. })), "{updated:?}");
        }
        let before = refused.hits();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let tries = refused.hits() - before;
        assert!((1..20).contains(&tries), "tried {tries} times in 2 s");
        rig.faults.clear();
        let back = async || scope.keys().await.contains(&scope.key("courseware/a"));
        eventually(PATIENCE, "it is back", back).await;
        registration.deregister().await.unwrap();
        rig.close().await;
    })
    .await;
}

/// Three at once, of which two are written as one.
#[tokio::test]
async fn an_update_that_is_refused_does_not_concern_those_before_it() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "service").await;
        let services = services(scope, &rig.session);
        let registration =
            services.register(Instance::new("courseware", "127.0.0.1:8400").id("a")).await.unwrap();
        let arm = || rig.faults.on("Txn").containing("courseware/a");
        let refused = rig.faults.on("Txn").containing(VALUE).always().inject(Fault::FailWith(denied()));
        let first = arm().inject(Fault::Hold(Until::Released));
        let mut one = Box::pin(registration.update(|instance| instance.weight = 2));
        assert!(futures::poll!(&mut one).is_pending());
        first.hit(1).await;
        let two = registration.update(|instance| instance.tags.push("blue".into()));
        let three = registration.update(|instance| instance.version = VALUE.into());
        let release = async { first.release() };
        let (one, two, three, ()) = tokio::join!(one, two, three, release);
        assert!(one.is_ok() && two.is_ok(), "{one:?} {two:?}");
        assert!(matches!(three, Err(Error::PermissionDenied { .. })), "{three:?}");
        assert_eq!(refused.hits(), 1);
        let shown = registration.instance();
        assert_eq!((shown.weight, shown.tags.len(), shown.version.as_str()), (2, 1, ""));
        let there = scope.client().get(scope.key("courseware/a"), None).await.unwrap();
        assert!(there.kvs()[0].value_str().unwrap().contains("blue"));
        registration.deregister().await.unwrap();
        rig.close().await;
    })
    .await;
}

/// What was applied compares nothing that is left to look at, and it cannot be fenced: nobody guesses.
#[tokio::test]
async fn what_cannot_be_told_is_unknown() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "name").await;
        let refuse = || {
            rig.faults.next("Txn", Fault::LoseAnswer);
            rig.faults.on("Txn").always().inject(Fault::FailWith(denied()));
        };
        let unknown =
            |result: Result<()>| assert!(matches!(result, Err(Error::OutcomeUnknown { .. })), "{result:?}");
        let leadership = rig.election().campaign("one").await.unwrap();
        refuse();
        unknown(leadership.proclaim(VALUE).await);
        rig.faults.clear();
        assert_eq!(times(scope).await, 1);
        leadership.resign().await.unwrap();

        let queue = Queue::new(&rig.session, scope.key("queue")).unwrap();
        queue.enqueue("item").await.unwrap();
        let claim = queue.claim().await.unwrap();
        refuse();
        unknown(claim.ack().await);
        rig.faults.clear();
        assert_eq!(queue.length().await.unwrap(), 0);
        drop(queue);
        rig.close().await;
    })
    .await;
}
