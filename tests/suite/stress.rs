//! Contenders that do anything at any time, over a channel that does anything to their requests; and an oracle that
//! knows what must hold.

mod contender;
mod oracle;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etcd_recipes::Session;
use futures::future::join_all;

use crate::support::check::{Scope, eventually, scoped};
use crate::support::faults::{Fault, Faults, Injection, Until};
use crate::support::line::line;
use crate::support::rounds;

use contender::Contender;
use oracle::Oracle;

/// Nothing takes that long, unless it is stuck; and no lease is lost before.
const PATIENCE: Duration = Duration::from_secs(60);
const SESSIONS: usize = 3;
const CONTENDERS_EACH: usize = 2;

/// Says which seed failed, so that it can be tried again: `ETCD_RECIPES_SEED=…`.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with ETCD_RECIPES_SEED={}", self.0);
        }
    }
}

/// In full length 40 rounds of 15 s; by default 3 of 8 s, side by side.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_contenders_exclude_each_other() {
    let (rounds, time) = rounds((3, Duration::from_secs(8)), (40, Duration::from_secs(15)));
    let given = std::env::var("ETCD_RECIPES_SEED").ok().map(|seed| seed.parse().expect("not a number"));
    let seeds: Vec<u64> = match given {
        Some(seed) => vec![seed],
        None => (0..rounds).map(|_| fastrand::u64(..)).collect(),
    };
    for seeds in seeds.chunks(4) {
        scoped(async |scope| {
            join_all(seeds.iter().map(|seed| round(scope, *seed, time))).await;
        })
        .await;
    }
}

async fn round(scope: &Scope, seed: u64, time: Duration) {
    let _seed = Seed(seed);
    let mut random = fastrand::Rng::with_seed(seed);
    let name = scope.key(&seed.to_string());
    let oracle = Arc::new(Oracle::watching(scope, &name).await);
    let until = Instant::now() + time;
    let mut channels = Vec::new();
    let mut running = Vec::new();
    for _ in 0..SESSIONS {
        let faults = Faults::new(scope.endpoint());
        // An attempt is given up after two seconds.
        let session = Session::builder_with_client(faults.client().await).ttl(PATIENCE);
        let session = session.connect_timeout(PATIENCE).connect().await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        let late = unreliable(&faults, &mut random);
        channels.push((faults, session.clone(), late));
        for _ in 0..CONTENDERS_EACH {
            let contender = Contender::new(&session, &name, oracle.clone(), random.fork());
            running.push(tokio::spawn(contender.run(until)));
        }
    }
    for contender in running {
        tokio::time::timeout(time + PATIENCE, contender).await.expect("stuck").unwrap();
    }
    let mut sessions = Vec::new();
    for (faults, session, late) in channels {
        faults.clear();
        scope.owns_lease(session.lease_id().expect("the session has no lease"));
        for late in late {
            late.answered(late.hits()).await;
        }
        sessions.push(session);
    }
    // The sessions live on, and with them whatever is stuck.
    let emptied =
        eventually(PATIENCE * 2, "empty", async || line(&mut scope.client(), &name).await.is_empty());
    if tokio::time::timeout(PATIENCE, emptied).await.is_err() {
        panic!(
            "seed {seed}: left in line: {:?}; {}",
            line(&mut scope.client(), &name).await,
            answering(&sessions).await
        );
    }
    for session in &sessions {
        let mutex = etcd_recipes::Mutex::new(session, &name).unwrap();
        let guard = tokio::time::timeout(PATIENCE / 4, mutex.lock()).await.expect("stuck").unwrap();
        oracle.enters(guard.token());
        oracle.leaves();
        guard.unlock().await.unwrap();
    }
    oracle.judge(scope).await;
    assert!(line(&mut scope.client(), &name).await.is_empty());
    for session in sessions {
        session.close().await.unwrap();
    }
}

/// Whether etcd answers on the channels of these sessions, for whoever looks for what is stuck.
async fn answering(sessions: &[Session]) -> String {
    let ask = async |session: &Session| {
        let (asked, mut client) = (Instant::now(), session.client());
        let answer = tokio::time::timeout(PATIENCE / 4, client.get("any", None)).await;
        format!(
            "{session:?} hears from etcd: {:?} after {:?}",
            answer.map(|answer| answer.is_ok()),
            asked.elapsed()
        )
    };
    join_all(sessions.iter().map(ask)).await.join("; ")
}

/// Makes a channel fail in every way, each with its own chance in a thousand. Returns those whose second copies come
/// late.
fn unreliable(faults: &Faults, random: &mut fastrand::Rng) -> Vec<Injection> {
    let (soon, late) = (Duration::from_millis(50), Duration::from_secs(3));
    let chances = [
        (40, Fault::LoseAnswer),
        (8, Fault::NeverAnswer),
        (40, Fault::FailBefore),
        (8, Fault::NeverSend),
        (40, Fault::Hold(Until::After(soon))),
        (15, Fault::Hold(Until::After(late))),
        (50, Fault::Twice(Until::After(soon))),
        (30, Fault::Twice(Until::After(late))),
    ];
    let inject = |(chance, fault): (u32, Fault)| {
        let twice = matches!(fault, Fault::Twice(_));
        let random = Mutex::new(random.fork());
        let arm = faults.on("Txn").when(move |_| random.lock().unwrap().u32(0..1000) < chance);
        let injection = arm.always().inject(fault);
        twice.then_some(injection)
    };
    chances.into_iter().filter_map(inject).collect()
}
