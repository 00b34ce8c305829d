//! Runs a command while it holds a lock: cron jobs, deployments and migrations that must not run twice at once.
//!
//! ```sh
//! guard nightly-report -- ./report.sh            # waits for its turn
//! guard --try nightly-report -- ./report.sh      # or not at all: exit code 75
//! ```
//!
//! A lock cannot stop what is already under way. So the command finds its fencing token in `ETCD_LOCK_REV`: a store
//! that keeps the highest token it has seen, and refuses lower ones, is safe whatever happens to this program.

mod job;
#[path = "../common/reach.rs"]
mod reach;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use etcd_recipes::{Error, Mutex, MutexGuard, Session};
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use self::job::{Job, code_of, killed_by, listen};

/// Bad arguments (`EX_USAGE`).
const USAGE: u8 = 64;
/// No etcd, or it refused (`EX_UNAVAILABLE`).
const UNAVAILABLE: u8 = 69;
/// The system refused something (`EX_OSERR`).
const SYSTEM: u8 = 71;
/// The lock was lost (`EX_IOERR`).
const LOST: u8 = 74;
/// The lock was not to be had (`EX_TEMPFAIL`).
const BUSY: u8 = 75;

const EXIT_CODES: &str = "\
Exit codes:
  COMMAND's own, or 128+n if signal n killed it or ended the waiting
   64  bad arguments
   69  etcd cannot be reached, or refuses
   71  the system refuses, for example to install a signal handler
   74  the lock was lost before COMMAND ended; COMMAND was stopped
   75  the lock is held by others (--try), or --timeout is over
  126  COMMAND cannot be executed
  127  COMMAND is not found";

/// Runs a command while it holds a lock on etcd.
///
/// COMMAND finds the lock's key in ETCD_LOCK_KEY and the fencing token in ETCD_LOCK_REV.
///
/// It runs in a process group of its own, all of which gets the signals HUP, INT, QUIT, TERM, USR1
/// and USR2 that this program gets: Ctrl-C once, and each of its processes. When the lock is lost,
/// the group gets TERM, and after the grace time KILL. On Ctrl-Z it is stopped as well, and goes on
/// only if the lock is still held then. Such a group cannot read from a terminal, so there is
/// nothing to read for COMMAND there; see --foreground.
///
/// The lock is released when COMMAND itself ends. If this program is killed by KILL, COMMAND runs
/// on, and others get the lock after the TTL: have it use its fencing token.
#[derive(Debug, Parser)]
#[command(
    name = "guard",
    verbatim_doc_comment,
    override_usage = "guard [OPTIONS] NAME -- COMMAND [ARG]...",
    after_help = EXIT_CODES
)]
struct Args {
    /// Endpoints of etcd, separated by commas [default: 127.0.0.1:2379; if nothing answers there, an
    /// embedded server does while this runs].
    #[arg(long, env = "ETCD_ENDPOINTS", value_delimiter = ',')]
    endpoints: Vec<String>,

    /// Seconds until others get the lock when this machine or its network dies.
    #[arg(long, value_name = "SECS", default_value_t = 10)]
    ttl: u64,

    /// How long to try to reach etcd.
    #[arg(long, value_name = "SECS", value_parser = seconds, default_value = "5")]
    connect_timeout: Duration,

    /// Wait for the lock no longer than this.
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    timeout: Option<Duration>,

    /// Do not wait for the lock at all.
    #[arg(long = "try", conflicts_with = "timeout")]
    once: bool,

    /// How long COMMAND may take to end when the lock is lost.
    #[arg(long, value_name = "SECS", value_parser = seconds, default_value = "5")]
    grace: Duration,

    /// Leave COMMAND in this process group, so that it can read from the terminal.
    ///
    /// The terminal sends it Ctrl-C and Ctrl-Z itself then, so INT and QUIT are not passed on.
    /// The other signals reach COMMAND, but not the processes that it started.
    #[arg(long, verbatim_doc_comment)]
    foreground: bool,

    /// The lock: all who use this name exclude each other, `etcdctl lock NAME` too.
    #[arg(value_name = "NAME")]
    name: String,

    /// What to run.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let code = run(&args).await.unwrap_or_else(|error| {
        eprintln!("guard: {error:#}");
        match error.downcast_ref() {
            Some(Error::InvalidName { .. } | Error::InvalidOption { .. }) => USAGE,
            Some(_) => UNAVAILABLE,
            None => SYSTEM,
        }
    });
    code.into()
}

/// Connects, does everything, and leaves nothing behind.
async fn run(args: &Args) -> Result<u8> {
    let mut signals = listen(&job::PASSED_ON)?;
    let ttl = Duration::from_secs(args.ttl);
    let (endpoints, _server) = reach::etcd(&args.endpoints).await?;
    let builder = Session::builder(endpoints).ttl(ttl).connect_timeout(args.connect_timeout);
    let session = tokio::select! {
        session = builder.connect() => session?,
        Some(signal) = signals.recv() => return Ok(killed_by(signal as i32)),
    };
    let code = run_locked(args, &session, &mut signals).await;
    // Takes back the lease, and every key with it. Whoever insists need not wait for an etcd that is away.
    tokio::select! {
        closed = session.close() => closed?,
        Some(_) = signals.recv() => {}
    }
    code
}

/// Takes the lock, runs the command and releases the lock.
async fn run_locked(args: &Args, session: &Session, signals: &mut mpsc::Receiver<Signal>) -> Result<u8> {
    let mutex = Mutex::new(session, &args.name)?;
    let acquired = tokio::select! {
        acquired = acquire(&mutex, args) => acquired?,
        Some(signal) = signals.recv() => return Ok(killed_by(signal as i32)),
    };
    let Some(guard) = acquired else {
        let holder = mutex.holder().await?.and_then(|holder| holder.identity);
        eprintln!("guard: {} is held by {}", args.name, holder.as_deref().unwrap_or("somebody"));
        return Ok(BUSY);
    };
    let mut job = match Job::start(args, &guard) {
        Ok(job) => job,
        Err(error) => {
            eprintln!("guard: cannot run {}: {error}", args.command[0].display());
            return Ok(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 });
        }
    };
    let ended = job.supervise(&guard, signals).await?;
    match (ended, guard.unlock().await) {
        (Some(status), Ok(())) => Ok(code_of(status)),
        (None, _) => Ok(LOST),
        (Some(_), Err(Error::Lost { .. })) => {
            eprintln!("guard: the lock was lost, perhaps before the command ended");
            Ok(LOST)
        }
        (Some(_), Err(error)) => Err(error.into()),
    }
}

/// Takes the lock as the arguments say; `None` if it is not to be had.
async fn acquire(mutex: &Mutex, args: &Args) -> etcd_recipes::Result<Option<MutexGuard>> {
    match args.timeout {
        _ if args.once => mutex.try_lock().await,
        Some(limit) => tokio::time::timeout(limit, mutex.lock()).await.ok().transpose(),
        None => mutex.lock().await.map(Some),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
