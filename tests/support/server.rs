//! One etcd server on loopback ports and a data directory of its own: a real one, or the embedded one as a process.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use etcd_client::Client;
use tempfile::TempDir;

use super::binaries::{Version, binaries};
use super::metrics::{Metrics, get};
use super::needs::{Needs, asked_for};
use super::ports::free_port;
use super::process::Process;

/// How long anything a server is asked to do may take on a slow and shared machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How a server is started.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    args: Vec<String>,
    listen: Vec<String>,
}

impl Options {
    /// etcd's own settings: election timeout 1 s, smallest lease 2 s.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Smallest lease 1 s; for a single server, which has no elections to lose.
    pub(crate) fn fast() -> Self {
        Self::timed(10, 100)
    }

    /// Smallest lease 1 s, and elections a slow machine does not lose.
    pub(crate) fn cluster() -> Self {
        Self::timed(50, 500)
    }

    fn timed(heartbeat: u32, election: u32) -> Self {
        let args = [format!("--heartbeat-interval={heartbeat}"), format!("--election-timeout={election}")];
        Self { args: args.into(), listen: Vec::new() }
    }

    /// Adds an argument, for example `--quota-backend-bytes=…`.
    #[must_use]
    pub(crate) fn arg(mut self, arg: impl Into<String>) -> Self {
        asked_for(Needs::Settings);
        self.args.push(arg.into());
        self
    }

    /// Serves clients at one more URL.
    #[must_use]
    pub(crate) fn listen(mut self, url: impl Into<String>) -> Self {
        self.listen.push(url.into());
        self
    }
}

/// The two ports of a member.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    pub(super) client: u16,
    pub(super) peer: u16,
}

impl Ports {
    pub(super) fn free() -> Self {
        Self { client: free_port(), peer: free_port() }
    }
}

/// An etcd server. Dropping it kills the process and removes its data.
#[derive(Debug)]
pub(crate) struct Server {
    ports: Ports,
    args: Vec<String>,
    process: Mutex<Option<Process>>,
    directory: TempDir,
}

impl Server {
    /// A single server with etcd's own settings, ready for requests.
    pub(crate) async fn start() -> Self {
        Self::with(Options::new()).await
    }

    /// A single server with short leases ([`Options::fast`]), ready for requests.
    pub(crate) async fn fast() -> Self {
        Self::with(Options::fast()).await
    }

    /// A single server, ready for requests.
    pub(crate) async fn with(options: Options) -> Self {
        let mut reason = String::new();
        // Another process may take a port between the look and etcd's own bind.
        for _ in 0..5 {
            let ports = Ports::free();
            let server = Self::launch_member(&options, "m0", ports, &format!("m0={}", peer_url(ports)));
            match server.try_ready().await {
                Ok(()) => return server,
                Err(error) => reason = error,
            }
        }
        panic!("etcd does not start: {reason}");
    }

    /// Starts a member's process without waiting for it.
    pub(super) fn launch_member(options: &Options, name: &str, ports: Ports, cluster: &str) -> Self {
        let directory = data_directory();
        if binaries().embedded {
            let args = vec![format!("--listen=127.0.0.1:{}", ports.client)];
            return Self::started(ports, args, directory);
        }
        let client = format!("http://127.0.0.1:{}", ports.client);
        let listen: Vec<_> = std::iter::once(&client).chain(&options.listen).cloned().collect();
        let mut args = vec![
            format!("--name={name}"),
            format!("--data-dir={}", directory.path().join("data").display()),
            format!("--listen-client-urls={}", listen.join(",")),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={}", peer_url(ports)),
            format!("--initial-advertise-peer-urls={}", peer_url(ports)),
            format!("--initial-cluster={cluster}"),
            "--initial-cluster-state=new".to_owned(),
            "--logger=zap".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        args.extend(options.args.iter().cloned());
        Self::started(ports, args, directory)
    }

    fn started(ports: Ports, args: Vec<String>, directory: TempDir) -> Self {
        let server = Self { ports, args, process: Mutex::new(None), directory };
        server.start_process();
        server
    }

    /// Starts the process again with the same ports and data, without waiting for it to be ready.
    pub(crate) fn launch(&self) {
        asked_for(Needs::Disk);
        self.start_process();
    }

    fn start_process(&self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join("log"))
            .expect("cannot write etcd's log");
        let mut command = Command::new(&binaries().etcd);
        command.args(&self.args).current_dir(self.directory.path()).stdin(Stdio::null());
        // Settings of the developer's own etcd must not leak in.
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_etcd_variable(name)) {
            command.env_remove(name);
        }
        command.stdout(log.try_clone().expect("cannot clone a file handle")).stderr(log);
        let process = Process::spawn(command, Some(self.directory.path())).expect("cannot run etcd");
        *self.process() = Some(process);
    }

    /// Waits until the server answers a health check, which needs a leader.
    pub(crate) async fn ready(&self) {
        if let Err(reason) = self.try_ready().await {
            panic!("etcd is not ready: {reason}");
        }
    }

    pub(super) async fn try_ready(&self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(body) = get(self.ports.client, "/health", Duration::from_secs(5)).await
                && body.contains("\"true\"")
            {
                return Ok(());
            }
            let ended = self.process().as_mut().is_none_or(|process| process.ended().is_some());
            if ended || Instant::now() > deadline {
                return Err(format!("{}\n{}", if ended { "it ended" } else { "too slow" }, self.log_tail()));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The address for clients, `http://127.0.0.1:PORT`.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.client)
    }

    /// The port for clients.
    pub(crate) fn port(&self) -> u16 {
        self.ports.client
    }

    /// The version of the running line.
    #[allow(clippy::unused_self)]
    pub(crate) fn version(&self) -> Version {
        binaries().version
    }

    /// Ends it with SIGTERM and waits for the end.
    pub(crate) async fn stop(&self) {
        let process = self.process().take();
        if let Some(process) = process {
            process.terminate(PATIENCE).await;
        }
    }

    /// Kills it with SIGKILL and waits for the end.
    pub(crate) fn kill(&self) {
        if let Some(process) = self.process().take() {
            process.kill();
        }
    }

    /// Freezes it with SIGSTOP: its connections stay open and nothing answers. Returns when it stands still.
    pub(crate) fn pause(&self) {
        self.process().as_mut().expect("etcd is not running").pause();
    }

    /// Lets it go on with SIGCONT.
    pub(crate) fn resume(&self) {
        self.process().as_mut().expect("etcd is not running").resume();
    }

    /// Stops it if it runs, starts it with the same ports and data, and waits until it is ready.
    pub(crate) async fn restart(&self) {
        self.stop().await;
        self.launch();
        self.ready().await;
    }

    /// Stops it, copies its data aside, and starts it again.
    pub(crate) async fn back_up(&self) {
        self.stop().await;
        self.copy_data("data", "backup");
        self.launch();
        self.ready().await;
    }

    /// Stops it, puts the data of the last backup in the place of its own, and starts it again.
    pub(crate) async fn restore(&self) {
        self.stop().await;
        std::fs::remove_dir_all(self.directory.path().join("data")).expect("no data");
        self.copy_data("backup", "data");
        self.launch();
        self.ready().await;
    }

    fn copy_data(&self, from: &str, to: &str) {
        let path = |name| self.directory.path().join(name);
        let copied = Command::new("cp").arg("-r").arg(path(from)).arg(path(to)).status();
        assert!(copied.expect("no cp").success(), "cannot copy etcd's data");
    }

    /// A new plain client of this server.
    pub(crate) async fn client(&self) -> Client {
        super::client([self.endpoint()]).await
    }

    /// `etcdctl` of the same version with this endpoint and the given arguments, ready to run.
    pub(crate) fn etcdctl<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(&binaries().etcdctl);
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_etcd_variable(name)) {
            command.env_remove(name);
        }
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(self.endpoint()).args(args);
        command
    }

    /// Runs `etcdctl` to its end without blocking the test's runtime. Panics when it fails.
    pub(crate) async fn ctl<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> String {
        let mut command = self.etcdctl(args);
        let run = super::background().spawn_blocking(move || (command.output(), command));
        let (output, command) = run.await.expect("etcdctl panicked");
        let output = output.expect("cannot run etcdctl");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?} failed: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What the server counted so far.
    pub(crate) async fn metrics(&self) -> Metrics {
        asked_for(Needs::Metrics);
        Metrics::read(self.ports.client).await
    }

    /// Every lease that is alive.
    pub(crate) async fn leases(&self) -> Vec<i64> {
        let answer = self.client().await.leases().await.expect("cannot list leases");
        answer.leases().iter().map(etcd_client::LeaseStatus::id).collect()
    }

    /// The revision of the newest write.
    pub(crate) async fn revision(&self) -> i64 {
        let answer = self.client().await.get("\0", None).await.expect("cannot read");
        answer.header().expect("an answer without header").revision()
    }

    /// Compacts everything before the newest revision and returns it.
    pub(crate) async fn compact(&self) -> i64 {
        let revision = self.revision().await;
        match self.client().await.compact(revision, None).await {
            Ok(_) => {}
            // Nobody wrote since the last time.
            Err(error) if error.to_string().contains("has been compacted") => {}
            Err(error) => panic!("cannot compact: {error}"),
        }
        revision
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap()
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }
}

pub(super) fn peer_url(ports: Ports) -> String {
    format!("http://127.0.0.1:{}", ports.peer)
}

fn is_etcd_variable(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("ETCD_") || name.starts_with("ETCDCTL_"))
}

/// In memory where there is such a place: etcd waits for its disk at every write.
fn data_directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let builder = || {
        let mut builder = tempfile::Builder::new();
        builder.prefix("etcd-recipes-");
        builder
    };
    let made = builder().tempdir_in(memory).or_else(|_| builder().tempdir());
    made.expect("no temporary directory for etcd")
}
