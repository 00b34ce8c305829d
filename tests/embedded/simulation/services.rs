//! Registrations: they come back by themselves, say what they were last told to say, and go when they are done.

use std::sync::Arc;
use std::time::Duration;

use etcd_recipes::Session;
use etcd_recipes::embedded::Server;
use etcd_recipes::service::{Instance, Registration, RegistrationState, Services};
use fastrand::Rng;
use tokio::task::JoinSet;

use super::discoveries::Discoveries;
use super::trace::Trace;
use super::world::{CALM, Process, World};

/// Instances that are registered.
pub(super) struct Registered {
    tasks: JoinSet<(Registration, Vec<u32>)>,
    discoveries: Discoveries,
}

impl Registered {
    pub(super) fn begin(
        server: &Arc<Server>,
        processes: &[Process],
        random: &mut Rng,
        trace: &Trace,
    ) -> Self {
        let mut tasks = JoinSet::new();
        for (number, process) in processes.iter().enumerate() {
            tasks.spawn(register(number, process.session.clone(), server.clone(), random.fork()));
        }
        Self { tasks, discoveries: Discoveries::begin(processes, trace) }
    }

    /// Once there are no faults any more.
    pub(super) async fn end(mut self, world: &World) {
        let server = &world.server;
        let mut registered = Vec::new();
        while let Some(done) = tokio::time::timeout(CALM, self.tasks.join_next()).await.expect("one is stuck")
        {
            registered.push(done.unwrap());
        }
        // It heals within two seconds of etcd answering.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let discoveries = self.discoveries.opened().await;
        for discovery in &discoveries {
            discovery.caught_up(world).await;
        }
        for (registration, weights) in registered {
            assert_eq!(registration.state(), RegistrationState::Registered);
            let key = server.keys(registration.key()).into_iter().next().expect("it is not there");
            assert_ne!(key.lease, 0, "it would stay for ever");
            let instance: serde_json::Value = serde_json::from_slice(&key.value).unwrap();
            let weight = u32::try_from(instance["weight"].as_u64().unwrap()).unwrap();
            assert!(weights.contains(&weight), "{weight} is none of {weights:?}");
            registration.deregister().await.unwrap();
        }
        assert!(server.keys("services/").is_empty());
        for discovery in &discoveries {
            discovery.caught_up(world).await;
        }
    }
}

/// Keeps an instance registered; gives the weights it may have in the end.
async fn register(
    number: usize,
    session: Session,
    server: Arc<Server>,
    mut random: Rng,
) -> (Registration, Vec<u32>) {
    let services = Services::new(&session);
    let instance = Instance::new("service", format!("10.0.0.{number}:80"));
    let registration = services.register(instance).await.unwrap();
    let mut weights = vec![1];
    for weight in 2..random.u32(3..8) {
        tokio::time::sleep(Duration::from_millis(random.u64(..6_000))).await;
        if random.u8(..4) == 0 {
            // Somebody cleans up.
            let mut client = server.client().await.unwrap();
            client.delete(registration.key(), None).await.unwrap();
        }
        let patience = Duration::from_millis(random.u64(1..20_000));
        let update = registration.update(|instance| instance.weight = weight);
        match tokio::time::timeout(patience, update).await {
            Ok(Ok(())) => weights = vec![weight],
            _ => weights.push(weight),
        }
    }
    (registration, weights)
}
