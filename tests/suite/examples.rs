//! The example programs, run as they are built: `cargo build --examples` comes first.

mod config_sync;
#[cfg(feature = "tonic")]
mod courseware;
mod guard;
mod indexer;
mod work_queue;

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use crate::support::binaries;
use crate::support::check::{eventually, scoped};
use crate::support::process::Process;
use crate::support::server::PATIENCE;

/// A running program whose output is read.
struct Program {
    process: Process,
    lines: mpsc::UnboundedReceiver<String>,
    /// All lines so far, for messages.
    seen: Vec<String>,
}

/// A built example with the endpoints in its environment.
fn example(name: &str, endpoint: &str) -> Command {
    let mut command = Command::new(binaries::example(name));
    command.env("ETCD_ENDPOINTS", endpoint);
    command
}

impl Program {
    fn start(mut command: Command) -> Self {
        command.env_remove("RUST_LOG").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::spawn(command, None).expect("cannot run an example");
        let (sender, lines) = mpsc::unbounded_channel();
        let child = process.child();
        let outputs: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|out| Box::new(out) as _),
            child.stderr.take().map(|out| Box::new(out) as _),
        ];
        for output in outputs.into_iter().flatten() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    let _ = sender.send(line);
                }
            });
        }
        Self { process, lines, seen: Vec::new() }
    }

    /// The next line, of either output, that begins so: the rest of it.
    async fn line(&mut self, begin: &str) -> String {
        loop {
            let line = tokio::time::timeout(PATIENCE, self.lines.recv()).await;
            let Ok(Some(line)) = line else { panic!("no line {begin:?}, but {:?}", self.seen) };
            self.seen.push(line.clone());
            if let Some(rest) = line.strip_prefix(begin) {
                return rest.to_owned();
            }
        }
    }

    /// Sends a line to its standard input.
    fn tell(&mut self, line: &str) {
        let input = self.process.child().stdin.as_mut().expect("its input is piped");
        writeln!(input, "{line}").expect("it does not listen");
    }

    fn signal(&mut self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for its own end: the exit code.
    async fn code(&mut self) -> i32 {
        let status = self.process.wait(PATIENCE).await;
        status.code().unwrap_or_else(|| panic!("ended with {status}"))
    }
}

/// The state of a process, as the system abbreviates it; `None` if it is gone or waits to be buried.
fn state(process: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The state follows the program's name, which stands in parentheses.
    let state = stat.rsplit_once(") ")?.1.chars().next()?;
    (state != 'Z').then_some(state)
}

async fn until_state(process: i32, wanted: Option<char>) {
    let what = format!("process {process} comes into the state {wanted:?}");
    eventually(PATIENCE, &what, async || state(process) == wanted).await;
}

#[tokio::test]
async fn tour_does_what_it_tells() {
    scoped(async |scope| {
        let begin = Instant::now();
        let mut tour = Program::start(example("tour", scope.endpoint()));
        let code = tour.code().await;
        tour.line("That was it").await;
        assert_eq!(code, 0);
        assert!(begin.elapsed() < Duration::from_secs(10), "it took {:?}", begin.elapsed());
    })
    .await;
}

#[tokio::test]
async fn tour_fails_without_etcd() {
    let nobody = format!("127.0.0.1:{}", crate::support::ports::free_port());
    let mut tour = Program::start(example("tour", &nobody));
    tour.line("tour: no etcd endpoint answered").await;
    assert_eq!(tour.code().await, 1);
}

#[tokio::test]
async fn a_second_dev_server_on_a_port_says_so() {
    let serve = |address: &str| {
        let mut command = Command::new(binaries::example("dev_server"));
        command.args(["--listen", address]);
        Program::start(command)
    };
    let mut first = serve("127.0.0.1:0");
    let address = first.line("listening on http://").await;
    let mut second = serve(&address);
    let why = second.line(&format!("dev_server: cannot listen on {address}: ")).await;
    assert!(why.contains("in use"), "{why}");
    assert_eq!(second.code().await, 1);
    first.signal(Signal::SIGTERM);
    assert_eq!(first.code().await, 0);
}
