//! Discovery: its changes lead to its snapshots, its revisions never go back, and in the end it shows who is registered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex as Shared};
use std::time::Duration;

use etcd_recipes::service::{Change, Discovery, Instance, Services};
use futures::StreamExt as _;
use tokio::task::JoinHandle;

use super::trace::Trace;
use super::world::{CALM, Process, World};

/// Those who want to know who is there.
pub(super) struct Discoveries {
    opening: Vec<JoinHandle<Seen>>,
}

/// A discovery, and what its changes came to.
pub(super) struct Seen {
    discovery: Discovery,
    told: Arc<Shared<Told>>,
}

#[derive(Default)]
struct Told {
    revision: i64,
    instances: BTreeMap<String, Arc<Instance>>,
}

impl Discoveries {
    pub(super) fn begin(processes: &[Process], trace: &Trace) -> Self {
        let open = |process: &Process| {
            let (services, trace) = (Services::new(&process.session), trace.clone());
            tokio::spawn(
                async move { Seen::begin(services.discover("service").open().await.unwrap(), trace) },
            )
        };
        Self { opening: processes.iter().map(open).collect() }
    }

    /// Those who are open by now; all are, once there are no faults any more.
    pub(super) async fn opened(self) -> Vec<Seen> {
        let mut opened = Vec::new();
        for one in self.opening {
            opened.push(tokio::time::timeout(CALM, one).await.expect("a discovery does not open").unwrap());
        }
        opened
    }
}

impl Seen {
    fn begin(discovery: Discovery, trace: Trace) -> Self {
        let told = Arc::new(Shared::new(Told::default()));
        let (mut changes, seen, following) = (discovery.changes(), told.clone(), discovery.clone());
        tokio::spawn(async move {
            while let Some(change) = changes.next().await {
                trace.note(format!("told of {change:?}"));
                seen.lock().unwrap().take(change, following.snapshot().revision);
            }
        });
        Self { discovery, told }
    }

    /// Waits until the snapshot and the changes say what etcd does.
    pub(super) async fn caught_up(&self, world: &World) {
        let caught_up = async {
            while !self.shows(world) {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(CALM, caught_up).await.expect("a discovery does not catch up");
    }

    fn shows(&self, world: &World) -> bool {
        let mut registered = BTreeMap::new();
        for key in world.server.keys("services/service/") {
            let instance: serde_json::Value = serde_json::from_slice(&key.value).unwrap();
            let id = key.key["services/service/".len()..].to_vec();
            registered.insert(String::from_utf8(id).unwrap(), instance["weight"].as_u64().unwrap());
        }
        let weights = |instances: &mut dyn Iterator<Item = &Arc<Instance>>| {
            instances.map(|one| (one.id.clone(), u64::from(one.weight))).collect::<BTreeMap<_, _>>()
        };
        let snapshot = self.discovery.snapshot();
        assert!(snapshot.malformed.is_empty());
        weights(&mut snapshot.instances.iter()) == registered
            && weights(&mut self.told.lock().unwrap().instances.values()) == registered
            && self.discovery.stale_for().is_none()
    }
}

impl Told {
    fn take(&mut self, change: Change, revision: i64) {
        assert!(revision >= self.revision, "revision {revision} after {}", self.revision);
        self.revision = revision;
        match change {
            Change::Added(instance) => {
                let before = self.instances.insert(instance.id.clone(), instance);
                assert_eq!(before, None, "it was there already");
            }
            Change::Updated { before, after } => {
                let known = self.instances.insert(after.id.clone(), after);
                assert_eq!(known, Some(before), "it was another before");
            }
            Change::Removed(instance) => {
                assert_eq!(self.instances.remove(&instance.id), Some(instance), "it was not so before");
            }
            other => panic!("{other:?}"),
        }
    }
}
