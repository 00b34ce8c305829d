//! `courseware_server` and `courseware_client`: who answers when servers come, change, stop and die.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{Program, example};
use crate::support::check::{Scope, scoped};
use crate::support::server::PATIENCE;

const TTL: Duration = Duration::from_secs(2);

/// A server that is registered.
struct Server {
    program: Program,
    address: String,
}

impl Server {
    async fn start(scope: &Scope) -> Self {
        let mut command = example("courseware_server", scope.endpoint());
        command.args(["--port=0", "--ttl=2", "--drain-ms=300", "--service", scope.name()]);
        let mut program = Program::start(command);
        let address = program.line("serving ").await;
        let key = program.line("registered ").await;
        assert_eq!(key, format!("services/{}/{address}", scope.name()));
        Self { program, address }
    }

    /// What it answers to a request for a page.
    fn get(&self, page: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(stream, "GET {page} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

/// A client that calls every few milliseconds.
fn client(scope: &Scope, arguments: &[&str]) -> Program {
    let mut command = example("courseware_client", scope.endpoint());
    command.args(["--interval-ms=4", "--service", scope.name()]).args(arguments);
    Program::start(command)
}

/// How often each answered the next so many calls. None may fail.
async fn shares(client: &mut Program, calls: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..calls {
        *shares.entry(answered(client).await).or_default() += 1;
    }
    shares
}

/// Who answered the next call.
async fn answered(client: &mut Program) -> String {
    let line = client.line("call ").await;
    let (_, from) = line.split_once(" answered by ").unwrap_or_else(|| panic!("a call has failed: {line}"));
    from.split_once(": ").expect("it says what").0.to_owned()
}

/// Forgets the calls so far.
fn skip(client: &mut Program) {
    while client.lines.try_recv().is_ok() {}
}

/// Waits until calls are answered by exactly these.
async fn until_served_by(client: &mut Program, servers: &[&Server]) {
    let begin = Instant::now();
    loop {
        skip(client);
        let shares = shares(client, 40).await;
        if shares.len() == servers.len() && servers.iter().all(|server| shares.contains_key(&server.address))
        {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{shares:?}");
    }
}

#[tokio::test]
async fn each_server_gets_its_share() {
    scoped(async |scope| {
        let servers = [Server::start(scope).await, Server::start(scope).await, Server::start(scope).await];
        let mut even = client(scope, &[]);
        let counts = shares(&mut even, 301).await;
        assert_eq!(counts.len(), 3, "{counts:?}");
        assert!(counts.values().all(|count| (100..=101).contains(count)), "{counts:?}");
        drop(even);

        let mut weighted = client(scope, &["--balancer=weighted", "--call=morning"]);
        until_served_by(&mut weighted, &servers.each_ref()).await;
        assert!(servers[1].get("/weight?weight=3").ends_with("weight 3\n"));
        assert!(servers[1].get("/weight?weight=many").starts_with("HTTP/1.1 400"));
        // The change is through as soon as three of five calls go there.
        let begin = Instant::now();
        loop {
            skip(&mut weighted);
            if shares(&mut weighted, 20).await[&servers[1].address] == 12 {
                break;
            }
            assert!(begin.elapsed() < PATIENCE);
        }
        let counts = shares(&mut weighted, 500).await;
        for (server, due) in servers.iter().zip([100, 300, 100_usize]) {
            assert!(counts[&server.address].abs_diff(due) * 10 <= due, "{counts:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn server_that_stops_cleanly_costs_no_call() {
    scoped(async |scope| {
        let (mut first, second) = (Server::start(scope).await, Server::start(scope).await);
        // Nothing is tried twice.
        let mut client = client(scope, &["--attempts=1", "--call=night"]);
        until_served_by(&mut client, &[&first, &second]).await;
        first.program.signal(Signal::SIGTERM);
        first.program.line("deregistered").await;
        first.program.line("stopped").await;
        assert_eq!(first.program.code().await, 0);
        until_served_by(&mut client, &[&second]).await;
        let third = Server::start(scope).await;
        until_served_by(&mut client, &[&second, &third]).await;
    })
    .await;
}

#[tokio::test]
async fn server_that_is_killed_is_not_called_for_long() {
    scoped(async |scope| {
        let (first, second) = (Server::start(scope).await, Server::start(scope).await);
        let mut client = client(scope, &[]);
        until_served_by(&mut client, &[&first, &second]).await;
        let Server { program: Program { process, .. }, address } = first;
        process.kill();
        let died = Instant::now();
        // Whoever calls it from now on is seen.
        let listener = TcpListener::bind(&address).unwrap();
        let (sender, visits) = mpsc::channel();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                drop(stream);
                if sender.send(Instant::now()).is_err() {
                    return;
                }
            }
        });
        // No call fails: the client sends those that nobody answered once more.
        let limit = TTL + Duration::from_millis(1500);
        while died.elapsed() < limit + Duration::from_secs(6) {
            assert_eq!(answered(&mut client).await, second.address);
        }
        let late = visits.try_iter().filter(|at| *at - died > limit).count();
        assert_eq!(late, 0, "calls went to it later than {limit:?} after its end");
        // A connection of our own ends the thread.
        drop(visits);
        drop(TcpStream::connect(&address));
    })
    .await;
}

#[tokio::test]
async fn server_whose_address_is_registered_by_another_gives_way() {
    scoped(async |scope| {
        let mut first = Server::start(scope).await;
        scope.client().put(format!("services/{}/{}", scope.name(), first.address), "{}", None).await.unwrap();
        first.program.line("superseded").await;
        assert_eq!(first.program.code().await, 1);
        scope.client().delete(format!("services/{}/{}", scope.name(), first.address), None).await.unwrap();
    })
    .await;
}
