//! What goes wrong: links that are cut or stalled, requests refused, held back, answered in vain or sent twice, leases
//! that end.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use etcd_recipes::embedded::{Fault, Injection, Link, Server};
use fastrand::Rng;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::trace::Trace;
use super::world::Process;

/// Methods that meet faults.
const METHODS: [&str; 7] = ["Txn", "Txn", "Txn", "Range", "LeaseGrant", "LeaseRevoke", "Watch"];

/// Which faults there are besides those of the network.
#[derive(Clone, Copy)]
pub(super) struct Kinds {
    pub(super) revokes: bool,
    pub(super) compacts: bool,
}

pub(super) struct Faults {
    task: Option<JoinHandle<()>>,
    stop: CancellationToken,
    links: Vec<Link>,
    held: Arc<Mutex<Vec<Injection>>>,
}

impl Faults {
    /// Lets things go wrong until they are told to end.
    pub(super) fn begin(
        server: &Arc<Server>,
        processes: &[Process],
        kinds: Kinds,
        random: Rng,
        trace: Trace,
    ) -> Self {
        let links: Vec<Link> = processes.iter().map(|process| process.link.clone()).collect();
        let (stop, held) = (CancellationToken::new(), Arc::new(Mutex::new(Vec::new())));
        let storm = storm(server.clone(), links.clone(), held.clone(), kinds, random, trace);
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            stopped.run_until_cancelled(storm).await;
        });
        Self { task: Some(task), stop, links, held }
    }

    /// From now on links work; what was held back still is.
    pub(super) async fn end(&mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            task.await.unwrap();
        }
        for link in &self.links {
            link.restore();
            link.clear();
        }
    }

    /// What was held back arrives.
    pub(super) async fn release(&self) {
        for held in self.held.lock().unwrap().drain(..) {
            held.release();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn storm(
    server: Arc<Server>,
    links: Vec<Link>,
    held: Arc<Mutex<Vec<Injection>>>,
    kinds: Kinds,
    mut random: Rng,
    trace: Trace,
) {
    loop {
        tokio::time::sleep(Duration::from_millis(random.u64(1..800))).await;
        let number = random.usize(..links.len());
        let (link, method) = (&links[number], METHODS[random.usize(..METHODS.len())]);
        let what = random.u8(..23);
        trace.note(format!("fault {what} at process {number}, {method}"));
        match what {
            0..5 => drop(link.inject(method, Fault::LoseAnswer, random.usize(1..4))),
            5..8 => drop(link.inject(method, Fault::Refuse, random.usize(1..4))),
            8..12 => held.lock().unwrap().push(link.inject(method, Fault::Hold, 1)),
            12 | 13 => {
                let mut held = held.lock().unwrap();
                if !held.is_empty() {
                    let which = random.usize(..held.len());
                    held.swap_remove(which).release();
                }
            }
            14 | 15 => link.cut(),
            16 => link.stall(),
            17 if kinds.revokes => {
                let leases = server.leases();
                if !leases.is_empty() {
                    server.expire(leases[random.usize(..leases.len())]);
                }
            }
            18 if kinds.compacts => {
                let _ = server.compact(random.i64(1..=server.revision()));
            }
            20..23 => held.lock().unwrap().push(link.inject(method, Fault::Twice, 1)),
            _ => {}
        }
        if random.u8(..3) == 0 {
            links[random.usize(..links.len())].restore();
        }
    }
}
