//! Somebody else registers the same id while nothing, or not all, is heard of it: that registration stays.

use etcd_recipes::service::{Instance, Registration};
use etcd_recipes::{Error, Result, Session};
use tokio::time::timeout;

use super::service_faults::{Rig, set};
use super::service_registration::services;
use crate::support::check::{Scope, scoped};
use crate::support::faults::{Fault, Until};
use crate::support::server::PATIENCE;
use crate::support::sessions::session;

/// The other one.
struct Rival {
    session: Session,
    registration: Option<Registration>,
}

impl Rival {
    async fn new(scope: &Scope) -> Self {
        Self { session: session(scope).await, registration: None }
    }

    async fn register(&mut self, scope: &Scope) {
        let instance = Instance::new("courseware", "127.0.0.1:8400").id("a").weight(7);
        self.registration = Some(services(scope, &self.session).register(instance).await.unwrap());
    }

    /// What it registered is there, and goes when it wants.
    async fn ends(self, rig: Rig<'_>) {
        assert_eq!(rig.weight().await, Some(7), "the newer registration is gone");
        self.registration.unwrap().deregister().await.unwrap();
        assert_eq!(rig.weight().await, None);
        self.session.close().await.unwrap();
        rig.close().await;
    }
}

/// Runs a call whose first request meets a fault. Before it is sent again, the rival registers.
async fn overtaken<T>(rig: &Rig<'_>, rival: &mut Rival, first: Fault, call: impl Future<Output = T>) -> T {
    rig.inject(first);
    let resent = rig.inject(Fault::Hold(Until::Released));
    let meanwhile = async {
        resent.hit(1).await;
        rival.register(rig.scope).await;
        resent.release();
    };
    tokio::join!(call, meanwhile).0
}

async fn hears_of_it(registration: &Registration) {
    timeout(PATIENCE, registration.superseded()).await.expect("it does not hear of it");
}

fn superseded(result: &Result<()>) -> bool {
    matches!(result, Err(Error::Superseded { .. }))
}

/// A call that took effect before the other came does so once, although its answer was lost.
#[tokio::test]
async fn what_was_done_before_is_not_done_again() {
    scoped(async |scope| {
        for what in ["register", "register again", "update", "deregister"] {
            let (rig, mut rival) = (Rig::new(scope).await, Rival::new(scope).await);
            let before = if what == "register" { None } else { Some(rig.register(1).await.unwrap()) };
            let lost = Fault::LoseAnswer;
            match (&before, what) {
                (Some(before), "update") => {
                    // That the other came is what counts.
                    let updated = overtaken(&rig, &mut rival, lost, set(before, 2)).await;
                    assert!(updated.is_ok() || superseded(&updated), "{updated:?}");
                    hears_of_it(before).await;
                }
                (Some(before), "deregister") => {
                    overtaken(&rig, &mut rival, lost, before.deregister()).await.unwrap();
                }
                _ => match overtaken(&rig, &mut rival, lost, rig.register(2)).await {
                    Ok(registration) => hears_of_it(&registration).await,
                    Err(error) => assert!(superseded(&Err(error)), "{what}"),
                },
            }
            rival.ends(rig).await;
        }
    })
    .await;
}

/// A request that never arrived is sent again, and finds somebody else.
#[tokio::test]
async fn what_was_not_done_before_is_not_done_any_more() {
    scoped(async |scope| {
        for what in ["update", "deregister"] {
            let (rig, mut rival) = (Rig::new(scope).await, Rival::new(scope).await);
            let registration = rig.register(1).await.unwrap();
            if what == "update" {
                let updated = overtaken(&rig, &mut rival, Fault::FailBefore, set(&registration, 2)).await;
                assert!(superseded(&updated), "{updated:?}");
            } else {
                // It might have been done before the other came.
                overtaken(&rig, &mut rival, Fault::FailBefore, registration.deregister()).await.unwrap();
            }
            rival.ends(rig).await;
        }
    })
    .await;
}

/// The watch says nothing of the other, and the answer is lost that would.
#[tokio::test]
async fn whoever_hears_nothing_finds_out_when_it_writes() {
    scoped(async |scope| {
        for (what, lost) in [("update", false), ("update", true), ("deregister", false), ("deregister", true)]
        {
            let (rig, mut rival) = (Rig::new(scope).await, Rival::new(scope).await);
            let registration = rig.register(1).await.unwrap();
            rig.faults.hold_answers("Watch", true);
            rival.register(scope).await;
            if lost {
                rig.inject(Fault::LoseAnswer);
            }
            if what == "update" {
                let result = set(&registration, 2).await;
                assert!(superseded(&result), "{what}, answer lost: {lost}: {result:?}");
            } else {
                // With an answer lost it may have been removed before the other came.
                let result = registration.deregister().await;
                assert!(superseded(&result) || lost && result.is_ok(), "{what}: {result:?}");
            }
            rival.ends(rig).await;
        }
    })
    .await;
}
