//! Keeps a file like a prefix in etcd, runs a command at each change, and shows the whole over HTTP.
//!
//! ```sh
//! config_sync app --file app.json --http 127.0.0.1:8080 -- systemctl reload app
//! etcdctl put app/level debug
//! curl 'http://127.0.0.1:8080/?key=level'      # debug
//! ```
//!
//! While etcd is away, file and HTTP keep the last known values.

mod http;
#[path = "../common/reach.rs"]
mod reach;
#[path = "../common/stop.rs"]
mod stop;

use std::fs::Permissions;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use etcd_recipes::{ConfigCache, ConfigSnapshot, Session};
use futures::{FutureExt as _, StreamExt as _};
use tokio::process::Command;

/// How long it tries to reach etcd at the start.
const CONNECTING: Duration = Duration::from_secs(30);

/// Mirrors the keys under PREFIX/ into a file, runs a command at each change, serves them over HTTP.
///
/// The file is a JSON object: `prefix`, `revision`, and `entries`, which maps each key (without
/// PREFIX/) to its `value` and `revision`. A value that is not UTF-8 has `value_base64` instead.
/// It is replaced as a whole, so readers never see half of it.
///
/// The command runs once at the start and then after each change, with the revision in
/// CONFIG_REVISION and the file in CONFIG_FILE; changes that come while it runs are one change.
/// That it fails is reported and nothing else.
///
/// GET / answers with the same object as the file, GET /?key=KEY with the bytes of one value.
/// The header `config-stale` says since how many seconds changes may be missing, 0 if none are.
///
/// Prints `listening ADDR` and, for each state, `synced revision=N keys=N`.
///
/// Exit codes: 0 after INT or TERM, 1 when etcd cannot be reached at the start or refuses, or the
/// file cannot be written, 2 for bad arguments.
#[derive(Debug, Parser)]
#[command(name = "config_sync", verbatim_doc_comment)]
struct Args {
    /// Endpoints of etcd, separated by commas [default: 127.0.0.1:2379; if nothing answers there, an
    /// embedded server does while this runs].
    #[arg(long, env = "ETCD_ENDPOINTS", value_delimiter = ',')]
    endpoints: Vec<String>,

    /// The prefix, with or without a slash at its end.
    prefix: String,

    /// The file to keep.
    #[arg(long, value_name = "OUT.json")]
    file: Option<PathBuf>,

    /// Where to serve HTTP, for example 127.0.0.1:8080; port 0 takes a free one.
    #[arg(long, value_name = "ADDR")]
    http: Option<std::net::SocketAddr>,

    /// What to run at each change.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    if let Err(error) = run(args).await {
        eprintln!("config_sync: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

async fn run(args: Args) -> Result<()> {
    let stop = stop::on_signal()?;
    let (endpoints, _server) = reach::etcd(&args.endpoints).await?;
    let connect = Session::builder(endpoints).connect_timeout(CONNECTING).connect();
    let Some(session) = stop.run_until_cancelled(connect).await else { return Ok(()) };
    let session = session?;
    let synced = stop.run_until_cancelled(sync(&args, &session)).await;
    session.close().await?;
    synced.unwrap_or(Ok(()))
}

/// Follows the prefix until it cannot.
async fn sync(args: &Args, session: &Session) -> Result<()> {
    let name = args.prefix.strip_suffix('/').unwrap_or(&args.prefix);
    let config = ConfigCache::open(session, name).await?;
    let mut changes = config.changes("");
    if let Some(address) = args.http {
        let server = http::Server::bind(address).await?;
        say(&format!("listening {}", server.address()?))?;
        tokio::spawn(server.serve(config.clone()));
    }
    loop {
        // The snapshot has all of them, and perhaps later ones, which then come once more.
        while let Some(Some(_)) = changes.next().now_or_never() {}
        let snapshot = config.snapshot();
        if let Some(file) = &args.file {
            replace(file, &snapshot).with_context(|| format!("cannot write {}", file.display()))?;
        }
        say(&format!("synced revision={} keys={}", snapshot.revision(), snapshot.len()))?;
        if let [program, arguments @ ..] = args.command.as_slice() {
            execute(program, arguments, args.file.as_deref(), snapshot.revision()).await;
        }
        if changes.next().await.is_none() {
            return Ok(());
        }
    }
}

/// Writes another file and puts it in the place of this one.
fn replace(path: &Path, snapshot: &ConfigSnapshot) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    let mut file = builder.permissions(Permissions::from_mode(0o644)).tempfile_in(folder)?;
    serde_json::to_writer_pretty(&mut file, snapshot)?;
    file.write_all(b"\n")?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

async fn execute(program: &str, arguments: &[String], file: Option<&Path>, revision: i64) {
    let mut command = Command::new(program);
    command.args(arguments).env("CONFIG_REVISION", revision.to_string()).kill_on_drop(true);
    if let Some(file) = file {
        command.env("CONFIG_FILE", file);
    }
    match command.status().await {
        Ok(status) if status.success() => {}
        Ok(status) => eprintln!("config_sync: {program} failed: {status}"),
        Err(error) => eprintln!("config_sync: {program} does not start: {error}"),
    }
}

/// Prints one line; an error, not a panic, when nobody reads it any more.
fn say(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").context("cannot print")
}
