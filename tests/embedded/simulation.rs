//! Processes that use the recipes on virtual time, with faults drawn from a seed. What must hold is checked while they
//! run and after. `SEED=… cargo test --test embedded simulation` runs one again: the same faults at the same times, but
//! whoever waits for the same thing may be woken in another order, so that a rare failure may take a few runs.

mod faults;
mod locks;
mod queues;
mod services;
mod world;

use locks::Locks;
use queues::Queues;
use services::Registered;
use world::World;

/// Everything that happens is drawn from the seed; gives what was written, and when.
fn run(seed: u64) -> String {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut world = World::new(seed).await;
        let World { server, processes, revokes, random, .. } = &mut world;
        let locks = Locks::begin(processes, *revokes, random);
        let queues = Queues::begin(processes, random);
        let registered = Registered::begin(server, processes, random);
        tokio::time::sleep(world::STORM).await;
        world.calm().await;
        locks.end(&world.processes).await;
        queues.end(&world.processes[0]).await;
        registered.end(&world.server).await;
        world.end().await
    })
}

/// Runs many seeds, and says which one failed.
fn run_all(seeds: impl Iterator<Item = u64>) {
    for seed in seeds {
        let result = std::panic::catch_unwind(|| run(seed));
        if let Err(panic) = result {
            eprintln!("seed {seed} failed: SEED={seed} runs it again");
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
        Some(seed) => println!("{}", run(seed)),
        None => run_all(0..half()),
    }
}

#[test]
fn random_faults_break_nothing_either() {
    if only().is_none() {
        run_all(1_000_000..1_000_000 + half());
    }
}
