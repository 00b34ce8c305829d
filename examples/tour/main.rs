//! A tour of the crate: sessions, locks, what happens when they are lost, elections, queues, configuration and services,
//! told step by step.
//!
//! Everything happens in this one process; Alice, Bob and Carol are sessions like those of three machines. Each step
//! checks what it says, so the tour is a test as well.

mod config;
mod election;
mod lock;
mod loss;
mod queue;
#[path = "../common/reach.rs"]
mod reach;
mod service;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use etcd_recipes::etcd_client::{Client, DeleteOptions};
use etcd_recipes::{Session, SessionState};

/// Shows all recipes on etcd, step by step, in a few seconds: locks, elections, a queue, a
/// configuration, services.
///
/// Writes below a name of its own and removes it again. With RUST_LOG=info the library tells its
/// side on standard error.
///
/// Exit codes: 0, 1 when a step did not do what it says or etcd cannot be reached, 2 for bad
/// arguments.
#[derive(Debug, Parser)]
#[command(name = "tour", verbatim_doc_comment)]
struct Args {
    /// Endpoints of etcd, separated by commas [default: 127.0.0.1:2379; if nothing answers there, an
    /// embedded server does while this runs].
    #[arg(long, env = "ETCD_ENDPOINTS", value_delimiter = ',')]
    endpoints: Vec<String>,

    /// Seconds until the tour is given up.
    #[arg(long, value_name = "SECS", default_value_t = 60)]
    timeout: u64,
}

/// Who takes part.
struct Cast {
    alice: Session,
    bob: Session,
    carol: Session,
    /// Somebody from outside, with an ordinary client.
    operator: Client,
    /// All keys of the tour are below.
    name: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let begin = Instant::now();
    let tour = tokio::time::timeout(Duration::from_secs(args.timeout), tour(&args));
    match tour.await.unwrap_or_else(|late| Err(late.into())) {
        Ok(()) => {
            println!("\nThat was it, in {:.1?}. No key and no lease is left.", begin.elapsed());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\ntour: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn tour(args: &Args) -> Result<()> {
    let (endpoints, _server) = reach::etcd(&args.endpoints).await?;
    let mut cast = meet(&endpoints).await?;
    lock::hand_over(&cast).await.context("in the chapter about locks")?;
    loss::delete_key(&mut cast).await.context("in the chapter about fencing")?;
    loss::revoke_lease(&mut cast).await.context("in the chapter about a lost lease")?;
    election::change_leader(&cast).await.context("in the chapter about elections")?;
    queue::deliver(&mut cast).await.context("in the chapter about a queue")?;
    queue::give_up(&cast).await.context("in the chapter about dead letters")?;
    config::publish(&mut cast).await.context("in the chapter about a configuration")?;
    service::come_and_go(&mut cast).await.context("in the chapter about a service")?;
    part(cast).await
}

/// Three sessions.
async fn meet(endpoints: &[String]) -> Result<Cast> {
    chapter("Three sessions");
    tell(
        "A session is one lease at etcd, kept alive in the background. Whatever a session holds goes when it goes.",
    );
    let name = format!("tour-{:016x}", fastrand::u64(..));
    let connect = async |who: &str| {
        Session::builder(endpoints)
            // So short only for the tour: when a lease is lost, a session finds out within a third of its TTL.
            .ttl(Duration::from_secs(3))
            .identity(who)
            // Below the name as well, so that the end of the tour sees whether anything is left.
            .namespace(format!("{name}/_etcd-recipes/"))
            .connect()
            .await
    };
    let (alice, bob, carol) = (connect("alice").await?, connect("bob").await?, connect("carol").await?);
    for (who, session) in [("alice", &alice), ("bob", &bob), ("carol", &carol)] {
        ensure!(session.state() == SessionState::Connected { generation: 1 }, "{who} is not connected");
        see(&format!("{who:5}  lease {:016x}  {:?}", lease(session)?, session.state()));
    }
    Ok(Cast { operator: alice.client(), alice, bob, carol, name })
}

/// The end: nothing is left.
async fn part(mut cast: Cast) -> Result<()> {
    chapter("Closing");
    tell("Closing a session revokes its lease, and all that it held goes in one request.");
    let leases = [lease(&cast.alice)?, lease(&cast.bob)?, lease(&cast.carol)?];
    for session in [&cast.alice, &cast.bob, &cast.carol] {
        session.close().await?;
        ensure!(session.state() == SessionState::Closed, "a session is not closed");
    }
    let all = DeleteOptions::new().with_prefix();
    let left = cast.operator.delete(format!("{}/", cast.name), Some(all)).await?.deleted();
    ensure!(left == 0, "{left} keys were left");
    let alive = cast.operator.leases().await?;
    ensure!(alive.leases().iter().all(|alive| !leases.contains(&alive.id())), "a lease is left");
    see("all closed; etcd has no key of theirs any more");
    Ok(())
}

fn lease(session: &Session) -> Result<i64> {
    session.lease_id().context("a session has no lease")
}

async fn read(client: &mut Client, key: &str) -> Result<String> {
    let answer = client.get(key, None).await?;
    Ok(answer.kvs().first().context("there is no such key")?.value_str()?.to_owned())
}

fn is_lost<T>(result: etcd_recipes::Result<T>) -> bool {
    result.is_err_and(|error| error.is_lost())
}

/// Begins a chapter.
fn chapter(title: &str) {
    println!("\n== {title}");
}

/// Tells what is done, and why.
fn tell(text: &str) {
    println!("   {text}");
}

/// Shows what is seen.
fn see(text: &str) {
    println!("     > {text}");
}

/// Waits until something holds that others bring about.
async fn until(mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    while !holds().await? {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
