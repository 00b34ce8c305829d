//! Registrations whose requests are lost, late or doubled, that are cancelled, and whose process stands still.

use std::time::Duration;

use etcd_recipes::service::{Instance, Registration, RegistrationState, Services};
use etcd_recipes::{Error, Result, Session};

use super::service_registration::services;
use crate::support::check::{Scope, eventually, scoped};
use crate::support::child::{Child, role};
use crate::support::faults::{Fault, Faults, Injection, Until};
use crate::support::poll::{drop_after_polls, drop_when_woken};
use crate::support::server::PATIENCE;
use crate::support::sessions::session;

/// Attempts of sessions with this TTL are given up after two seconds.
const TTL: Duration = Duration::from_secs(60);

/// A session with faults of its own.
pub(super) struct Rig<'a> {
    pub(super) scope: &'a Scope,
    pub(super) faults: Faults,
    session: Session,
    services: Services,
}

impl<'a> Rig<'a> {
    pub(super) async fn new(scope: &'a Scope) -> Self {
        let faults = Faults::new(scope.endpoint());
        let session = Session::builder_with_client(faults.client().await);
        let session = session.ttl(TTL).connect_timeout(TTL).connect().await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        let services = services(scope, &session);
        Self { scope, faults, session, services }
    }

    pub(super) fn inject(&self, fault: Fault) -> Injection {
        self.faults.on("Txn").containing(self.scope.name()).inject(fault)
    }

    pub(super) async fn register(&self, weight: u32) -> Result<Registration> {
        let instance = Instance::new("courseware", "127.0.0.1:8400").id("a").weight(weight);
        let registering = tokio::time::timeout(PATIENCE, self.services.register(instance));
        registering.await.expect("stuck")
    }

    /// The weight that everybody sees.
    pub(super) async fn weight(&self) -> Option<u64> {
        let answer = self.scope.client().get(self.scope.key("courseware/a"), None).await.unwrap();
        let value: serde_json::Value = serde_json::from_slice(answer.kvs().first()?.value()).unwrap();
        value["weight"].as_u64()
    }

    pub(super) async fn close(self) {
        self.faults.clear();
        self.session.close().await.unwrap();
    }
}

pub(super) async fn set(registration: &Registration, weight: u32) -> Result<()> {
    registration.update(|instance| instance.weight = weight).await
}

/// Everything that can become of a request without the caller knowing; the late ones arrive when they are released.
const FAULTS: [Fault; 5] = [
    Fault::FailBefore,
    Fault::LoseAnswer,
    Fault::NeverAnswer,
    Fault::Hold(Until::Released),
    Fault::Twice(Until::Released),
];

/// Lets what was held back go, and waits until etcd has answered it.
async fn arrive(injection: &Injection, fault: &Fault) {
    if matches!(fault, Fault::Hold(_) | Fault::Twice(_)) {
        injection.release();
        injection.answered(injection.hits()).await;
    }
}

#[tokio::test]
async fn register_takes_effect_once() {
    scoped(async |scope| {
        for fault in FAULTS {
            let rig = Rig::new(scope).await;
            let injection = rig.inject(fault.clone());
            let registration = rig.register(1).await.unwrap();
            set(&registration, 2).await.unwrap();
            arrive(&injection, &fault).await;
            assert_eq!(rig.weight().await, Some(2), "{fault:?}");
            set(&registration, 3).await.unwrap();
            assert_eq!(rig.weight().await, Some(3), "{fault:?}");
            assert_eq!(registration.state(), RegistrationState::Registered);
            registration.deregister().await.unwrap();
            assert!(scope.keys().await.is_empty());
            rig.close().await;
        }
    })
    .await;
}

/// The copy arrives after the instance was deregistered, or registered by somebody else.
#[tokio::test]
async fn late_register_does_not_come_back() {
    scoped(async |scope| {
        for fault in [Fault::Hold(Until::Released), Fault::Twice(Until::Released)] {
            let rig = Rig::new(scope).await;
            let injection = rig.inject(fault.clone());
            let registration = rig.register(1).await.unwrap();
            registration.deregister().await.unwrap();
            arrive(&injection, &fault).await;
            assert!(scope.keys().await.is_empty(), "{fault:?}");

            let injection = rig.inject(fault.clone());
            let old = rig.register(1).await.unwrap();
            let other = session(scope).await;
            let newer = Instance::new("courseware", "127.0.0.1:8400").id("a").weight(7);
            let newer = services(scope, &other).register(newer).await.unwrap();
            arrive(&injection, &fault).await;
            assert_eq!(rig.weight().await, Some(7), "{fault:?}");
            drop(old);
            newer.deregister().await.unwrap();
            other.close().await.unwrap();
            rig.close().await;
        }
    })
    .await;
}

#[tokio::test]
async fn update_takes_effect_once_and_never_after_a_later_one() {
    scoped(async |scope| {
        for fault in FAULTS {
            let rig = Rig::new(scope).await;
            let registration = rig.register(1).await.unwrap();
            let injection = rig.inject(fault.clone());
            set(&registration, 2).await.unwrap();
            assert_eq!(rig.weight().await, Some(2), "{fault:?}");
            set(&registration, 3).await.unwrap();
            arrive(&injection, &fault).await;
            assert_eq!(rig.weight().await, Some(3), "{fault:?}");
            set(&registration, 2).await.unwrap();
            assert_eq!(rig.weight().await, Some(2), "{fault:?}");
            // And not after the end.
            let injection = rig.inject(fault.clone());
            set(&registration, 4).await.unwrap();
            registration.deregister().await.unwrap();
            arrive(&injection, &fault).await;
            assert!(scope.keys().await.is_empty(), "{fault:?}");
            rig.close().await;
        }
    })
    .await;
}

#[tokio::test]
async fn deregister_is_certain_and_spares_the_next_one() {
    scoped(async |scope| {
        for fault in FAULTS {
            let rig = Rig::new(scope).await;
            let registration = rig.register(1).await.unwrap();
            let injection = rig.inject(fault.clone());
            registration.deregister().await.unwrap();
            assert!(scope.keys().await.is_empty(), "{fault:?}");
            let next = rig.register(2).await.unwrap();
            arrive(&injection, &fault).await;
            assert_eq!(rig.weight().await, Some(2), "{fault:?}");
            next.deregister().await.unwrap();
            rig.close().await;
        }
    })
    .await;
}

/// The request is not sent three times in a row.
#[tokio::test]
async fn deregister_goes_on_until_etcd_has_it() {
    scoped(async |scope| {
        let rig = Rig::new(scope).await;
        let registration = rig.register(1).await.unwrap();
        for _ in 0..3 {
            rig.inject(Fault::FailBefore);
        }
        registration.deregister().await.unwrap();
        assert!(scope.keys().await.is_empty());
        rig.close().await;
    })
    .await;
}

/// The answer of a healing put is lost.
#[tokio::test]
async fn healing_takes_effect_once() {
    scoped(async |scope| {
        for fault in FAULTS {
            let rig = Rig::new(scope).await;
            let registration = rig.register(1).await.unwrap();
            let injection = rig.inject(fault.clone());
            scope.client().delete(registration.key(), None).await.unwrap();
            eventually(PATIENCE, "it is back", async || rig.weight().await == Some(1)).await;
            set(&registration, 2).await.unwrap();
            arrive(&injection, &fault).await;
            assert_eq!(rig.weight().await, Some(2), "{fault:?}");
            registration.deregister().await.unwrap();
            assert!(scope.keys().await.is_empty());
            rig.close().await;
        }
    })
    .await;
}

/// Somebody else registers while our put of it is under way unanswered.
#[tokio::test]
async fn healing_does_not_overwrite_a_newer_registration() {
    scoped(async |scope| {
        let rig = Rig::new(scope).await;
        let registration = rig.register(1).await.unwrap();
        let held = rig.inject(Fault::Hold(Until::Released));
        scope.client().delete(registration.key(), None).await.unwrap();
        held.hit(1).await;
        let other = session(scope).await;
        let newer = Instance::new("courseware", "127.0.0.1:8400").id("a").weight(7);
        let newer = services(scope, &other).register(newer).await.unwrap();
        held.release();
        tokio::time::timeout(PATIENCE, registration.superseded()).await.expect("it does not hear of it");
        assert_eq!(rig.weight().await, Some(7));
        assert!(matches!(set(&registration, 3).await, Err(Error::Superseded { .. })));
        newer.deregister().await.unwrap();
        other.close().await.unwrap();
        rig.close().await;
    })
    .await;
}

/// The same id is registered again in the session while a request of the registration before is under way.
#[tokio::test]
async fn next_registration_does_not_inherit_what_is_under_way() {
    scoped(async |scope| {
        for what in ["register", "update", "deregister", "drop", "heal"] {
            let rig = Rig::new(scope).await;
            let held = rig.faults.on("Txn").containing(scope.name());
            let held = if what == "register" { held } else { held.skip(1) };
            let held = held.inject(Fault::Hold(Until::Released));
            let first = async {
                let registration = rig.register(1).await?;
                match what {
                    "update" => set(&registration, 2).await?,
                    "deregister" => registration.deregister().await?,
                    "heal" => {
                        scope.client().delete(registration.key(), None).await.unwrap();
                        registration.superseded().await;
                    }
                    _ => {}
                }
                Ok::<_, Error>(())
            };
            let second = async {
                held.hit(1).await;
                let (second, ()) = tokio::join!(rig.register(7), async {
                    // It is asked for before the first is answered.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    held.release();
                });
                second.unwrap()
            };
            let (first, second) = tokio::join!(first, second);
            if matches!(what, "register" | "update") {
                assert!(matches!(first, Err(Error::Superseded { .. })), "{what}: {first:?}");
            } else {
                first.unwrap();
            }
            assert_eq!(rig.weight().await, Some(7), "{what}");
            set(&second, 8).await.unwrap();
            assert_eq!(rig.weight().await, Some(8), "{what}");
            second.deregister().await.unwrap();
            assert!(scope.keys().await.is_empty(), "{what}");
            rig.close().await;
        }
    })
    .await;
}

/// Runs an operation with a cut after each poll, in both ways, until it is through; `after` looks at what is left.
async fn every_cut<T>(
    mut begin: impl AsyncFnMut() -> Option<Registration>,
    operation: impl AsyncFn(Option<&Registration>) -> T,
    mut after: impl AsyncFnMut(Option<T>, Option<Registration>),
) {
    for woken in [false, true] {
        for polls in 1..50 {
            let registration = begin().await;
            let operation = operation(registration.as_ref());
            let result = match woken {
                false => drop_after_polls(polls, operation).await,
                true => drop_when_woken(polls, operation).await,
            };
            let through = result.is_some();
            after(result, registration).await;
            if through {
                break;
            }
            assert!(polls < 49, "it is never through");
        }
    }
}

#[tokio::test]
async fn dropped_register_leaves_nothing() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let instance = || Instance::new("courseware", "127.0.0.1:8400").id("a");
        every_cut(
            async || None,
            async |_| services.register(instance()).await.unwrap(),
            async |registered, _| {
                drop(registered);
                let gone = async || scope.keys().await.is_empty();
                eventually(PATIENCE, "nothing is left", gone).await;
                // Also a request that was on its way then leaves nothing.
                tokio::time::sleep(Duration::from_millis(5)).await;
                eventually(PATIENCE, "nothing is left", gone).await;
            },
        )
        .await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn dropped_update_and_deregister_go_on() {
    scoped(async |scope| {
        let rig = Rig::new(scope).await;
        every_cut(
            async || Some(rig.register(1).await.unwrap()),
            async |registration| set(registration.unwrap(), 2).await.unwrap(),
            async |_, registration| {
                let registration = registration.unwrap();
                let weight = u64::from(registration.instance().weight);
                eventually(PATIENCE, "it is there", async || rig.weight().await == Some(weight)).await;
                registration.deregister().await.unwrap();
                assert!(scope.keys().await.is_empty());
            },
        )
        .await;
        every_cut(
            async || Some(rig.register(1).await.unwrap()),
            async |registration| registration.unwrap().deregister().await.unwrap(),
            async |_, registration| {
                eventually(PATIENCE, "it is gone", async || scope.keys().await.is_empty()).await;
                drop(registration);
            },
        )
        .await;
        rig.close().await;
    })
    .await;
}

/// A process that registers, updates and deregisters when told.
#[test]
#[ignore = "run by other tests, in a process of its own"]
fn body() {
    let Some(mut role) = role() else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let session = Session::builder([role.variable("ENDPOINT")]).ttl(Duration::from_secs(2));
        let session = session.connect().await.unwrap();
        let format = etcd_recipes::service::formats::Json::under(role.variable("ROOT"));
        let services = Services::with_format(&session, format);
        let instance = Instance::new("courseware", "127.0.0.1:8400").id("a").weight(1);
        let registration = services.register(instance).await.unwrap();
        role.say(format!("{}", session.lease_id().unwrap()));
        loop {
            let result = match role.hear().await.as_str() {
                "update" => set(&registration, 9).await,
                "deregister" => registration.deregister().await,
                "superseded" => {
                    registration.superseded().await;
                    Ok(())
                }
                _ => break,
            };
            role.say(match result {
                Ok(()) => "done",
                Err(Error::Superseded { .. }) => "superseded",
                Err(_) => "failed",
            });
        }
        session.close().await.unwrap();
        role.say("bye");
    });
}

async fn child(scope: &Scope) -> Child {
    let root = scope.key("");
    let variables = [("ENDPOINT", scope.endpoint()), ("ROOT", root.as_str())];
    let mut child = Child::spawn("service_faults::body", &variables);
    scope.owns_lease(child.line().await.parse().unwrap());
    child
}

/// The old process deregisters at its end, after the new one has registered: the new entry stays.
#[tokio::test]
async fn old_process_does_not_deregister_the_new_one() {
    scoped(async |scope| {
        for last in ["deregister", "end"] {
            let mut old = child(scope).await;
            let rig = Rig::new(scope).await;
            let registration = rig.register(7).await.unwrap();
            old.tell(last);
            old.expect(if last == "end" { "bye" } else { "superseded" }).await;
            assert_eq!(rig.weight().await, Some(7));
            old.kill().await;
            registration.deregister().await.unwrap();
            rig.close().await;
        }
    })
    .await;
}

/// A process stands still, longer or shorter than its lease lives, while its successor registers.
#[tokio::test]
async fn process_that_stood_still_does_not_overwrite_its_successor() {
    scoped(async |scope| {
        for pause in [Duration::from_millis(300), Duration::from_secs(4)] {
            let mut old = child(scope).await;
            old.pause();
            let rig = Rig::new(scope).await;
            let registration = rig.register(7).await.unwrap();
            old.tell("update");
            tokio::time::sleep(pause).await;
            old.resume();
            old.expect("superseded").await;
            old.tell("superseded");
            old.expect("done").await;
            assert_eq!(rig.weight().await, Some(7));
            old.tell("end");
            old.expect("bye").await;
            assert_eq!(rig.weight().await, Some(7));
            old.kill().await;
            registration.deregister().await.unwrap();
            rig.close().await;
        }
    })
    .await;
}
