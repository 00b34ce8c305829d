//! A queue of work for shell scripts: one side pushes lines, the other runs a command for each.
//!
//! ```sh
//! work_queue push thumbnails photo-1.jpg photo-2.jpg
//! find photos -name '*.jpg' | work_queue push thumbnails
//! work_queue work thumbnails --max-attempts 5 -- ./thumbnail.sh      # in as many processes as wanted
//! ```
//!
//! The command finds the item on its standard input. If it ends with 0 the item is done; otherwise, or if this program or
//! its machine dies, it is delivered again, and after its last attempt it is put among the dead letters.

mod handler;
#[path = "../common/reach.rs"]
mod reach;

use std::ffi::OsString;
use std::io::BufRead as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use etcd_recipes::{Error, Queue, Session};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::handler::{Ended, Handler};

/// Bad arguments (`EX_USAGE`).
const USAGE: u8 = 64;
/// No etcd, or it refused (`EX_UNAVAILABLE`).
const UNAVAILABLE: u8 = 69;
/// The system refused something (`EX_OSERR`).
const SYSTEM: u8 = 71;
/// As many lines are pushed at once.
const BATCH: usize = 64;

const EXIT_CODES: &str = "\
Exit codes:
    0  done; `work` ends by itself only with --until-empty, or when it is told to by INT or TERM
   64  bad arguments
   69  etcd cannot be reached, or refuses
   71  the system refuses, for example to run COMMAND";

/// A queue of work on etcd.
#[derive(Debug, Parser)]
#[command(name = "work_queue", verbatim_doc_comment, after_help = EXIT_CODES)]
struct Args {
    /// Endpoints of etcd, separated by commas [default: 127.0.0.1:2379; if nothing answers there, an
    /// embedded server does while this runs].
    #[arg(long, global = true, env = "ETCD_ENDPOINTS", value_delimiter = ',')]
    endpoints: Vec<String>,

    /// Seconds until items are delivered again when the machine that works on them dies.
    #[arg(long, global = true, value_name = "SECS", default_value_t = 10)]
    ttl: u64,

    /// How long to try to reach etcd.
    #[arg(long, global = true, value_name = "SECS", value_parser = seconds, default_value = "5")]
    connect_timeout: Duration,

    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Puts items into a queue, in their order.
    Push {
        /// The queue.
        queue: String,
        /// The items; without any, the lines of standard input.
        values: Vec<String>,
    },
    /// Runs a command for each item, one after the other.
    ///
    /// COMMAND gets the item on its standard input, and in its environment ETCD_ITEM_KEY, ETCD_ITEM_ATTEMPT (1 for the
    /// first) and ETCD_ITEM_TOKEN: a number that is larger each time the item is delivered, for stores that can refuse
    /// older ones. It is stopped when the item is lost to another worker.
    Work {
        /// The queue.
        queue: String,
        /// After so many attempts the item is put among the dead letters.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        max_attempts: Option<u32>,
        /// How long an item rests after COMMAND failed.
        #[arg(long, value_name = "SECS", value_parser = seconds, default_value = "1")]
        retry_delay: Duration,
        /// End when the queue is empty.
        #[arg(long)]
        until_empty: bool,
        /// What to run.
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
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
    match run(&args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("work_queue: {error:#}");
            let code = match error.downcast_ref() {
                Some(Error::InvalidName { .. } | Error::InvalidOption { .. } | Error::TooLarge { .. }) => {
                    USAGE
                }
                Some(_) => UNAVAILABLE,
                None => SYSTEM,
            };
            code.into()
        }
    }
}

/// Connects, does the task, and leaves nothing behind.
async fn run(args: &Args) -> Result<()> {
    let ttl = Duration::from_secs(args.ttl);
    let mut stop = Stop::listen()?;
    let (endpoints, _server) = reach::etcd(&args.endpoints).await?;
    let connect = Session::builder(endpoints).ttl(ttl).connect_timeout(args.connect_timeout).connect();
    let session = tokio::select! {
        session = connect => session?,
        () = stop.asked() => return Ok(()),
    };
    let done = match &args.task {
        Task::Push { queue, values } => push(&Queue::new(&session, queue)?, values).await,
        Task::Work { queue, max_attempts, retry_delay, until_empty, command } => {
            let mut builder = Queue::builder(&session, queue);
            if let Some(attempts) = max_attempts {
                builder = builder.max_attempts(*attempts);
            }
            let handler = Handler::new(command, *retry_delay);
            work(&builder.build()?, &handler, *until_empty, &mut stop).await
        }
    };
    session.close().await?;
    done
}

async fn push(queue: &Queue, values: &[String]) -> Result<()> {
    let mut pushed = 0;
    if values.is_empty() {
        let mut lines = std::io::stdin().lock().split(b'\n');
        loop {
            let batch: Vec<Vec<u8>> =
                lines.by_ref().take(BATCH).collect::<Result<_, _>>().context("standard input")?;
            if batch.is_empty() {
                break;
            }
            pushed += batch.len();
            push_batch(queue, batch).await?;
        }
    } else {
        for batch in values.chunks(BATCH) {
            pushed += batch.len();
            push_batch(queue, batch.iter().map(|value| value.clone().into_bytes()).collect()).await?;
        }
    }
    println!("pushed {pushed}");
    Ok(())
}

/// Pushes several at once, or one by one if they are too large for that.
async fn push_batch(queue: &Queue, batch: Vec<Vec<u8>>) -> Result<()> {
    match queue.enqueue_all(batch.clone()).await {
        Err(Error::TooLarge { .. }) => {
            for value in batch {
                queue.enqueue(value).await?;
            }
        }
        result => drop(result?),
    }
    Ok(())
}

async fn work(queue: &Queue, handler: &Handler, until_empty: bool, stop: &mut Stop) -> Result<()> {
    loop {
        if until_empty && queue.length().await? == 0 {
            return Ok(());
        }
        let claim = tokio::select! {
            claim = queue.claim() => claim?,
            () = stop.asked() => return Ok(()),
            // Others may take the last one, or give it up.
            () = tokio::time::sleep(Duration::from_secs(1)), if until_empty => continue,
        };
        // Whoever tells us to stop waits for the command; whoever insists does not.
        let ended = tokio::select! {
            ended = handler.run(&claim) => ended?,
            () = stop.insisted() => Ended::Stopped,
        };
        handler.settle(claim, ended).await?;
        if stop.was_asked() {
            return Ok(());
        }
    }
}

/// The wish that this program ends: once, it ends after the item it works on; twice, at once.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
    asked: u32,
}

impl Stop {
    fn listen() -> Result<Self> {
        let [interrupt, terminate] = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
        Ok(Self { interrupt: interrupt?, terminate: terminate?, asked: 0 })
    }

    fn was_asked(&self) -> bool {
        self.asked > 0
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
        self.asked += 1;
    }

    async fn insisted(&mut self) {
        while self.asked < 2 {
            self.asked().await;
        }
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
