//! Processes that use the recipes on virtual time, with faults drawn from a seed. What must hold is checked while they
//! run and after. `SEED=… TRACE=1 cargo test --test embedded simulation::random -- --nocapture` runs one again, exactly, and
//! prints what happens; `SEEDS=…` sets how many are run, `REPLAYS=…` how many are run twice and compared.

mod configs;
mod discoveries;
mod faults;
mod locks;
mod queues;
mod services;
mod trace;
mod world;

use std::process::Command;
use std::time::Duration;

use configs::Configs;
use locks::Locks;
use queues::Queues;
use services::Registered;
use trace::{Line, Trace};
use world::World;

/// Everything that happens is drawn from the seed; gives what went over the links and what was told, and when.
fn run(seed: u64) -> Vec<Line> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let trace = Trace::begin();
        let mut world = World::new(seed, &trace).await;
        let World { server, processes, revokes, random, .. } = &mut world;
        // Not everything at once, so that what one does is not always lost among the others.
        let mut some = || random.bool();
        let (locks, queues, registered, configs) = (some(), some(), some(), some());
        let mut locks = locks.then(|| Locks::begin(processes, *revokes, random, &trace));
        let queues = queues.then(|| Queues::begin(processes, random, &trace));
        let registered = registered.then(|| Registered::begin(server, processes, random, &trace));
        let mut configs = configs.then(|| Configs::begin(processes, random, &trace));
        tokio::time::sleep(world::STORM).await;
        world.calm().await;
        if let Some(locks) = &mut locks {
            locks.end(&world.processes).await;
        }
        if let Some(queues) = queues {
            queues.end(&world.processes).await;
        }
        if let Some(registered) = registered {
            registered.end(&world).await;
        }
        if let Some(configs) = &mut configs {
            configs.end(&world).await;
        }
        world.end().await;
        // Also what arrived last has done nothing that it must not.
        let history = world.history.lock().unwrap();
        if let Some(locks) = &locks {
            locks.check_writes(&history);
        }
        if let Some(configs) = &configs {
            configs.check_writes(&history);
        }
        for queue in ["claimed/", "taken/"] {
            let left = world.server.keys(queue);
            assert!(left.is_empty(), "enqueued again: {left:?}");
        }
        trace.lines()
    })
}

/// Runs many seeds, and says which one failed.
fn run_all(seeds: impl Iterator<Item = u64>) {
    for seed in seeds {
        let result = std::panic::catch_unwind(|| run(seed));
        if let Err(panic) = result {
            eprintln!(
                "seed {seed} failed; the same again, with what happens:\n\
                 SEED={seed} TRACE=1 cargo test --test embedded simulation::random -- --nocapture"
            );
            std::panic::resume_unwind(panic);
        }
    }
}

fn only() -> Option<u64> {
    std::env::var("SEED").ok().map(|seed| seed.parse().expect("SEED is a number"))
}

/// How many seeds each of the halves runs.
fn half() -> u64 {
    match std::env::var("SEEDS") {
        Ok(seeds) => seeds.parse::<u64>().expect("SEEDS is a number") / 2,
        Err(_) => 1_000,
    }
}

#[test]
fn random_faults_break_nothing() {
    match only() {
        Some(seed) => run_all(seed..=seed),
        None => run_all(0..half()),
    }
}

/// Runs a seed as who looks into it does, in a process of its own; gives what that prints.
fn run_elsewhere(seed: u64) -> String {
    let tests = std::env::current_exe().expect("no path of this test binary");
    let mut command = Command::new(tests);
    command.args(["simulation::random", "--nocapture"]).env("SEED", seed.to_string()).env("TRACE", "1");
    let done = command.output().unwrap();
    let printed = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "seed {seed} fails elsewhere:\n{printed}");
    printed
}

#[test]
fn a_seed_replays_exactly() {
    let replays = std::env::var("REPLAYS").map_or(16, |seeds| seeds.parse().expect("REPLAYS is a number"));
    let seeds = only().map_or(0..replays, |seed| seed..seed + 1);
    let runs: Vec<_> = seeds.map(|seed| (seed, run(seed))).collect();
    // The clock on the wall shows another second from here on.
    std::thread::sleep(Duration::from_millis(1_100));
    for (seed, lines) in runs {
        let once: Vec<_> = lines.iter().map(|line| format!("{line:?}")).collect();
        let printed = run_elsewhere(seed);
        let again: Vec<_> = printed.lines().collect();
        let differs = once.iter().zip(&again).position(|(one, other)| one != other);
        if let Some(at) = differs {
            let about = at.saturating_sub(10);
            panic!("seed {seed} differs in line {at}:\n{:#?}\n{:#?}", &once[about..=at], &again[about..=at]);
        }
        assert_eq!(once.len(), again.len(), "seed {seed}");
    }
}

#[test]
fn random_faults_break_nothing_either() {
    if only().is_none() {
        run_all(1_000_000..1_000_000 + half());
    }
}
