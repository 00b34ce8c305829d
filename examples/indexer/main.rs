//! A word index over a log of documents, built by one leader at a time: run as many indexers as you like.
//!
//! ```sh
//! indexer --id a --documents 100 & indexer --id b &   # one leads, the other follows
//! etcdctl get --prefix indexer-index/lock/            # which documents contain "lock", and how often
//! ```
//!
//! Kill the leader, stop it, cut it off: another goes on where it stopped, and each document is indexed once. Why that
//! is so stands in `index.rs`.

mod index;
#[path = "../common/reach.rs"]
mod reach;
#[path = "../common/stop.rs"]
mod stop;

use std::convert::Infallible;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use clap::Parser;
use etcd_recipes::{Election, Error, Leadership, Session};
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use self::index::{Index, Step};

/// How long it tries to reach etcd at the start.
const CONNECTING: Duration = Duration::from_secs(30);
/// How long a step may take before it is tried again.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the leader looks for a new document when all are indexed, and tries again what failed.
const IDLE: Duration = Duration::from_millis(500);
/// How often it says how far it is.
const REPORTS: Duration = Duration::from_secs(1);

/// Keeps a word index of documents in etcd, as one of several candidates of which one leads.
///
/// Documents are the keys NAME-docs/00000001 and following; they are indexed as
/// NAME-index/WORD/NUMBER, and NAME-cursor holds the number of the last one.
///
/// Prints a line for each change: `following leader=ID`, `no leader`, `leading token=N from=N`,
/// `indexed N`, `lost`, `resigned`. On INT and TERM it resigns and ends.
///
/// Exit codes: 0 after INT or TERM, 1 when etcd cannot be reached at the start or refuses,
/// 2 for bad arguments.
#[derive(Debug, Parser)]
#[command(name = "indexer", verbatim_doc_comment)]
struct Args {
    /// Endpoints of etcd, separated by commas [default: 127.0.0.1:2379; if nothing answers there, an
    /// embedded server does while this runs].
    #[arg(long, env = "ETCD_ENDPOINTS", value_delimiter = ',')]
    endpoints: Vec<String>,

    /// What others call this indexer.
    #[arg(long)]
    id: String,

    /// The election, and the beginning of all keys.
    #[arg(long, value_name = "NAME", default_value = "indexer")]
    election: String,

    /// Pause between two documents, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 100)]
    interval_ms: u64,

    /// Seconds until another leads when this indexer dies.
    #[arg(long, value_name = "SECS", default_value_t = 10)]
    ttl: u64,

    /// Write this many sample documents first, where they are missing.
    #[arg(long, value_name = "N", default_value_t = 0)]
    documents: u64,

    /// Print each document that is indexed, and not only one a second.
    #[arg(long)]
    verbose: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    if let Err(error) = run(args).await {
        eprintln!("indexer: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Connects, takes part in the election until a signal comes, and leaves nothing behind.
async fn run(args: Args) -> Result<()> {
    let stop = stop::on_signal()?;
    let ttl = Duration::from_secs(args.ttl);
    let (endpoints, _server) = reach::etcd(&args.endpoints).await?;
    let builder = Session::builder(endpoints).ttl(ttl).connect_timeout(CONNECTING);
    let Some(session) = stop.run_until_cancelled(builder.connect()).await else { return Ok(()) };
    let session = session?;
    let index = Index::new(session.client(), &args.election);
    let ended = Candidate { args, index, session: session.clone() }.run(&stop).await;
    session.close().await?;
    ended
}

/// One of those who may lead.
struct Candidate {
    args: Args,
    index: Index,
    session: Session,
}

impl Candidate {
    /// Follows and leads by turns, until it is told to stop.
    async fn run(&self, stop: &CancellationToken) -> Result<()> {
        let samples = stop.run_until_cancelled(self.index.write_samples(self.args.documents)).await;
        samples.unwrap_or(Ok(())).context("cannot write the sample documents")?;
        let election = Election::new(&self.session, &self.args.election)?;
        loop {
            let leadership = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                leadership = election.campaign(self.args.id.as_str()) => leadership?,
                ended = self.follow(&election) => return ended,
            };
            let leading = leadership.run(self.lead(&leadership));
            match stop.run_until_cancelled(leading).await {
                None => {
                    return match leadership.resign().await {
                        Ok(()) => say("resigned"),
                        Err(error) if error.is_lost() => say("lost"),
                        Err(error) => Err(error.into()),
                    };
                }
                Some(Err(Error::Lost { .. })) => say("lost")?,
                Some(Err(error)) => return Err(error.into()),
                Some(Ok(Err(error))) => return Err(error),
            }
        }
    }

    /// Tells who leads, as long as the session lasts.
    async fn follow(&self, election: &Election) -> Result<()> {
        let mut observations = election.observe();
        while let Some(observation) = observations.next().await {
            match observation?.leader {
                // This is us, a moment before the campaign ends.
                Some(leader) if Some(leader.lease) == self.session.lease_id() => {}
                Some(leader) => say(&format!("following leader={}", String::from_utf8_lossy(&leader.value)))?,
                None => say("no leader")?,
            }
        }
        Ok(())
    }

    /// Indexes one document after the other. What fails is tried again; only printing must not.
    async fn lead(&self, leadership: &Leadership) -> Result<Infallible> {
        let mut announced = false;
        let mut printed: Option<Instant> = None;
        let mut unprinted = None;
        loop {
            let step = tokio::time::timeout(PATIENCE, self.index.step(leadership)).await;
            let step = step.unwrap_or_else(|_| Err(anyhow!("no answer within {PATIENCE:?}")));
            if let (Ok(Step { number, .. }), false) = (&step, announced) {
                say(&format!("leading token={} from={number}", leadership.token()))?;
                announced = true;
            }
            let busy = match step {
                Ok(Step { number, done: true }) => {
                    unprinted = Some(number);
                    true
                }
                Ok(Step { done: false, .. }) => false,
                Err(error) => {
                    tracing::warn!("{error:#}; trying again");
                    false
                }
            };
            let due = self.args.verbose || !busy || printed.is_none_or(|at| at.elapsed() >= REPORTS);
            if let Some(number) = unprinted.take_if(|_| due) {
                say(&format!("indexed {number}"))?;
                printed = Some(Instant::now());
            }
            let pause = if busy { Duration::from_millis(self.args.interval_ms) } else { IDLE };
            tokio::time::sleep(pause).await;
        }
    }
}

/// Prints one line; an error, not a panic, when nobody reads it any more.
fn say(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").context("cannot print")
}
