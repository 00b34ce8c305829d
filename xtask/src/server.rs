//! One etcd that runs as long as xtask does.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cargo::Env;
use crate::etcd::{self, Etcd};

/// How long an etcd may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often to start over, should another program take the port first.
const ATTEMPTS: usize = 3;

/// Runs etcd (`$@`) until it ends or standard input does, which also happens
/// when xtask is killed; then removes its data (`$0`).
const KEEPER: &str = r#"
exec 3<&0
"$@" 3<&- </dev/null & etcd=$!
(read -r _ <&3; kill $etcd) 2>/dev/null & watch=$!
wait $etcd; code=$?
kill $watch 2>/dev/null
rm -rf -- "$0"
exit $code
"#;

/// Where data goes: a file system in memory, if the machine has one.
fn base() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if tempfile::tempfile_in(&memory).is_ok() { memory } else { std::env::temp_dir() }
}

/// A running etcd; it ends and its data goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    keeper: Child,
    url: String,
}

impl Server {
    /// Starts an etcd on a free port of the loopback interface and waits until it answers.
    pub(crate) fn start(root: &Path, etcd: &Etcd, task: &str) -> Result<Self> {
        let logs = root.join("target/etcd/log");
        fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let log = logs.join(format!("{task}.log"));
        println!("xtask: starting {etcd} (log: {})", log.display());
        for _ in 0..ATTEMPTS {
            let mut server = Self::spawn(etcd, &log)?;
            if server.wait(etcd)? {
                return Ok(server);
            }
        }
        bail!("etcd {} does not start; its log {} says why", etcd.version, log.display())
    }

    /// Spawns the etcd and the shell that looks after it, away from the
    /// terminal's signals: on ctrl-c xtask goes and etcd goes with it.
    fn spawn(etcd: &Etcd, log: &Path) -> Result<Self> {
        let (url, peer_url) = free_urls()?;
        let base = base();
        let data = tempfile::Builder::new().prefix("etcd-recipes-").tempdir_in(&base);
        let data = data.with_context(|| format!("cannot use {} for data", base.display()))?.keep();
        let log = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let keeper = etcd::command(Path::new("/bin"), "sh")
            .arg("-c")
            .arg(KEEPER)
            .arg(&data)
            .arg(etcd.dir.join("etcd"))
            .args(["--name", "xtask", "--logger", "zap", "--log-outputs", "stderr"])
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("xtask={peer_url}"), "--data-dir"])
            .arg(data.join("data"))
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("/bin/sh does not start")?;
        Ok(Self { keeper, url })
    }

    /// Waits until etcd answers; `false` when it ended instead.
    fn wait(&mut self, etcd: &Etcd) -> Result<bool> {
        let address = self.url.trim_start_matches("http://").to_owned();
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if self.keeper.try_wait()?.is_some() {
                return Ok(false);
            }
            if TcpStream::connect(&address).is_ok() {
                let mut health = etcd::command(&etcd.dir, "etcdctl");
                let health = health.args(["--endpoints", &self.url, "endpoint", "health"]);
                let status = health.stdout(Stdio::null()).stderr(Stdio::null()).status();
                if status.context("etcdctl does not start")?.success() {
                    return Ok(true);
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("etcd {} started but does not answer at {} in {PATIENCE:?}", etcd.version, self.url)
    }

    /// What tells a program where this etcd is.
    pub(crate) fn env(&self) -> [Env<'static>; 2] {
        let metrics = OsString::from(format!("{}/metrics", self.url));
        [("ETCD_ENDPOINTS", OsString::from(&self.url)), ("ETCD_METRICS", metrics)]
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        // Nothing is left to do for a keeper that cannot be waited for.
        let _ = self.keeper.wait();
    }
}

/// Two addresses nobody listens on: for clients and for peers.
fn free_urls() -> Result<(String, String)> {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on 127.0.0.1");
    let (client, peer) = (bind()?, bind()?);
    Ok((format!("http://{}", client.local_addr()?), format!("http://{}", peer.local_addr()?)))
}
