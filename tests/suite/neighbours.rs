//! Side by side with programs of neighbours, where they are installed: the README says how. Each is named by a variable
//! of the environment; without it, its tests say so and pass.

use std::path::Path;
use std::process::Command;

use etcd_recipes::service::formats::Endpoints;
use etcd_recipes::service::{Discovery, Instance, Registration, Services};
use etcd_recipes::{Election, Session};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tonic::transport::server::{Server, TcpIncoming};

use crate::support::background;
use crate::support::check::{Scope, eventually, scoped};
use crate::support::foreign::Foreign;
use crate::support::server::PATIENCE;
use crate::support::sessions::session;

/// A program of `tests/neighbours`, if the variable is set.
fn installed(variable: &str) -> Option<String> {
    let value = std::env::var(variable).ok();
    if value.is_none() {
        eprintln!("skipped: {variable} is not set");
    }
    value
}

// --- Go's `client/v3/naming/endpoints` and its gRPC resolver ---

const NAMING: &str = "NEIGHBOUR_NAMING";

/// The program, about the service that is called like the scope.
fn naming(program: &str, scope: &Scope, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args([scope.endpoint(), scope.name()]).args(args);
    command
}

/// Runs it to its end, which is soon.
fn go(program: &str, scope: &Scope, args: &[&str]) -> String {
    let output = naming(program, scope, args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// A gRPC server without any methods; its address.
async fn serve() -> String {
    let listener = background().spawn(TcpListener::bind("127.0.0.1:0")).await.unwrap().unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = Server::builder().add_routes(tonic::service::Routes::default());
    background().spawn(router.serve_with_incoming(TcpIncoming::from(listener)));
    address
}

async fn register(services: &Services, scope: &Scope, address: &str) -> Registration {
    let instance = Instance::new(scope.name(), address).id(address).weight(3).metadata("zone", "a");
    services.register(instance).await.unwrap()
}

#[tokio::test]
#[ignore = "needs a program of a neighbour"]
async fn go_lists_watches_and_calls_what_we_register() {
    let Some(program) = installed(NAMING) else { return };
    scoped(async |scope| {
        let session = session(scope).await;
        let services = Services::with_format(&session, Endpoints);
        let (a, b) = (serve().await, serve().await);
        let mut watch = Foreign::program(naming(&program, scope, &["watch"]));
        let (key, of_a) = (scope.key(&a), register(&services, scope, &a).await);
        let endpoint = |weight: &str| json!({"Addr": a, "Metadata": {"weight": weight, "zone": "a"}});
        assert_eq!(json(&go(&program, scope, &[])), json!({ &key: endpoint("3") }));
        assert_eq!(json(&watch.line().await), json!({"Op": 0, "Key": key, "Endpoint": endpoint("3")}));
        of_a.update(|instance| instance.weight = 5).await.unwrap();
        assert_eq!(json(&watch.line().await), json!({"Op": 0, "Key": key, "Endpoint": endpoint("5")}));

        let of_b = register(&services, scope, &b).await;
        let mut calls = Foreign::program(naming(&program, scope, &["call"]));
        for address in [&a, &b, &a] {
            while calls.line().await != *address {}
        }
        of_a.deregister().await.unwrap();
        assert_eq!(json(&watch.line().await)["Key"], scope.key(&b));
        let deleted = json!({"Op": 1, "Key": key, "Endpoint": {"Addr": "", "Metadata": null}});
        assert_eq!(json(&watch.line().await), deleted);
        // The resolver hears of it at its own time; then nobody calls there any more.
        eventually(PATIENCE, "only one is called", async || {
            let mut last = Vec::new();
            for _ in 0..4 {
                last.push(calls.line().await);
            }
            last.iter().all(|address| *address == b)
        })
        .await;
        of_b.deregister().await.unwrap();
        assert_eq!(json(&go(&program, scope, &[])), json!({}));
        session.close().await.unwrap();
    })
    .await;
}

/// Waits until discovery shows an instance like this, or none.
async fn shows(discovery: &Discovery, expected: Option<&Instance>) {
    eventually(PATIENCE, &format!("{expected:?} is shown"), async || {
        let snapshot = discovery.snapshot();
        snapshot.instances.iter().map(|instance| &**instance).eq(expected)
    })
    .await;
}

#[tokio::test]
#[ignore = "needs a program of a neighbour"]
async fn we_discover_what_go_registers_updates_and_deletes() {
    let Some(program) = installed(NAMING) else { return };
    scoped(async |scope| {
        let session = session(scope).await;
        let services = Services::with_format(&session, Endpoints);
        let discovery = services.discover(scope.name()).open().await.unwrap();
        let key = scope.key("10.0.0.1:50051");
        let add = |metadata: &[&str]| {
            go(&program, scope, &[&["add", &key, "10.0.0.1:50051"], metadata].concat());
        };
        let plain = || Instance::new(scope.name(), "10.0.0.1:50051").id("10.0.0.1:50051");
        add(&[]);
        shows(&discovery, Some(&plain())).await;
        add(&[r#""blue""#]);
        shows(&discovery, Some(&plain().metadata("Metadata", "blue"))).await;
        add(&[r#"{"weight": 7, "version": "1.2.0", "tags": ["x"], "zone": "b", "cores": 8}"#]);
        let full = plain().weight(7).version("1.2.0").tag("x").metadata("zone", "b").metadata("cores", "8");
        shows(&discovery, Some(&full)).await;
        go(&program, scope, &["delete", &key]);
        shows(&discovery, None).await;
        assert!(discovery.snapshot().malformed.is_empty());
        drop(discovery);
        session.close().await.unwrap();
    })
    .await;
}

// --- The election of the npm package `etcd3` ---

const NPM: &str = "NEIGHBOUR_NPM";

/// Its candidates and observers, by the folder that has `node_modules`.
fn node(folder: &str, scope: &Scope, args: &[&str]) -> Foreign {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/neighbours/election.js");
    let mut command = Command::new("node");
    command.env("NODE_PATH", Path::new(folder).join("node_modules")).arg(script);
    command.args([scope.endpoint(), scope.name()]).args(args);
    Foreign::program(command)
}

/// The election that it means by the scope's name.
fn election(session: &Session, scope: &Scope) -> Election {
    Election::new(session, format!("election/{}", scope.name())).unwrap()
}

async fn candidates(election: &Election, count: usize) {
    eventually(PATIENCE, &format!("{count} candidates"), async || {
        election.candidates().await.unwrap().len() == count
    })
    .await;
}

#[tokio::test]
#[ignore = "needs a program of a neighbour"]
async fn candidates_of_npm_stand_in_one_line_with_ours() {
    let Some(folder) = installed(NPM) else { return };
    scoped(async |scope| {
        let session = session(scope).await;
        let election = election(&session, scope);
        let mut observer = node(&folder, scope, &["observe"]);
        let mut observations = election.observe();
        let mut leader = async || {
            let leader = observations.next().await.unwrap().unwrap().leader;
            leader.map(|leader| String::from_utf8(leader.value).unwrap())
        };
        assert_eq!(leader().await, None);

        let ours = election.campaign("ours").await.unwrap();
        assert_eq!(leader().await.as_deref(), Some("ours"));
        let mut first = node(&folder, scope, &["campaign", "first"]);
        candidates(&election, 2).await;
        let mut waiting = Box::pin(election.campaign("last"));
        tokio::select! {
            _ = &mut waiting => panic!("it did not wait"),
            () = candidates(&election, 3) => {}
        }
        assert!(first.said().is_empty(), "it leads before its turn");
        ours.proclaim("ours again").await.unwrap();
        assert_eq!(leader().await.as_deref(), Some("ours again"));
        ours.resign().await.unwrap();

        assert_eq!(first.line().await, "elected");
        assert_eq!(leader().await.as_deref(), Some("first"));
        first.say("proclaim news");
        assert_eq!(leader().await.as_deref(), Some("news"));
        first.say("resign");
        let last = waiting.await.unwrap();
        assert_eq!(leader().await.as_deref(), Some("last"));
        while observer.line().await != "last" {}
        last.resign().await.unwrap();
        candidates(&election, 0).await;
        session.close().await.unwrap();
    })
    .await;
}
