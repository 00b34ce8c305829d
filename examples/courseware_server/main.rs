//! A gRPC server that registers itself. Start several, then `courseware_client`; kill one, start another, change a weight.
//!
//! ```sh
//! courseware_server --port 8400 & courseware_server --port 8500 & courseware_server --port 8600 &
//! courseware_client --balancer weighted
//! curl 'http://127.0.0.1:8400/weight?weight=3'
//! ```

#[path = "../courseware_proto/mod.rs"]
mod proto;
#[path = "../common/reach.rs"]
mod reach;
mod teach;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::extract::{Query, State};
use clap::Parser;
use etcd_recipes::Session;
use etcd_recipes::service::{Instance, Registration, Services};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use self::proto::courseware::courseware_server::CoursewareServer;
use self::proto::greet::greet_server::GreetServer;
use self::teach::Teacher;

/// How long calls that are under way may take at the end.
const ENDING: Duration = Duration::from_secs(5);

/// Serves the gRPC services rpc.Courseware and Greet, and registers itself.
///
/// Prints `serving ADDRESS`, `registered KEY`, `weight N` for each change, `superseded` when another
/// process has registered under the same address, and at the end `deregistered` and `stopped`.
/// http://ADDRESS/weight?weight=3 changes the weight.
///
/// On TERM and INT it deregisters, goes on serving for a moment, and ends when all calls are through.
///
/// Exit codes: 0 after TERM or INT, 1 when something failed, 2 for bad arguments.
#[derive(Debug, Parser)]
#[command(name = "courseware_server", verbatim_doc_comment)]
struct Args {
    /// Endpoints of etcd, separated by commas [default: 127.0.0.1:2379; if nothing answers there, an
    /// embedded server does while this runs].
    #[arg(long, env = "ETCD_ENDPOINTS", value_delimiter = ',')]
    endpoints: Vec<String>,

    /// Where to listen, and what others connect to.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,

    /// The port; 0 for any.
    #[arg(long, value_name = "P")]
    port: u16,

    /// The name of the service.
    #[arg(long, default_value = "courseware")]
    service: String,

    /// The share of the calls, next to that of the others.
    #[arg(long, default_value_t = 1)]
    weight: u32,

    /// Seconds until others stop calling when this process dies.
    #[arg(long, value_name = "SECS", default_value_t = 5)]
    ttl: u64,

    /// How long to go on serving after deregistering, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    drain_ms: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("courseware_server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let listener = TcpListener::bind((args.host.as_str(), args.port)).await.context("cannot listen")?;
    let address = listener.local_addr()?;
    let (endpoints, _server) = reach::etcd(&args.endpoints).await?;
    let session = Session::builder(endpoints);
    let session = session.ttl(Duration::from_secs(args.ttl)).connect().await?;
    println!("serving {address}");

    // Whoever finds it registered can call it: it listens already.
    let instance = Instance::new(&args.service, address.to_string()).weight(args.weight);
    let registration = Arc::new(Services::new(&session).register(instance).await?);
    println!("registered {}", String::from_utf8_lossy(registration.key()));
    let ending = CancellationToken::new();
    let mut server = tokio::spawn(serve(listener, address, registration.clone(), ending.clone()));
    let superseded = registration.superseded();
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
        () = superseded => println!("superseded"),
        ended = &mut server => return ended?,
    }

    // First nobody finds it any more, then there is time for those who have just found it, then it stops.
    registration.deregister().await?;
    println!("deregistered");
    tokio::time::sleep(Duration::from_millis(args.drain_ms)).await;
    ending.cancel();
    if let Ok(ended) = tokio::time::timeout(ENDING, server).await {
        ended??;
    }
    session.close().await?;
    println!("stopped");
    Ok(())
}

async fn serve(
    listener: TcpListener,
    address: SocketAddr,
    registration: Arc<Registration>,
    ending: CancellationToken,
) -> Result<()> {
    let web = axum::Router::new().route("/weight", axum::routing::get(set_weight)).with_state(registration);
    let teacher = Teacher::new(address);
    let routes = Routes::from(web)
        .add_service(CoursewareServer::new(teacher.clone()))
        .add_service(GreetServer::new(teacher));
    let server = Server::builder().accept_http1(true).add_routes(routes);
    server.serve_with_incoming_shutdown(TcpIncoming::from(listener), ending.cancelled()).await?;
    Ok(())
}

#[derive(Deserialize)]
struct Weight {
    weight: u32,
}

async fn set_weight(
    State(registration): State<Arc<Registration>>,
    Query(Weight { weight }): Query<Weight>,
) -> Result<String, (axum::http::StatusCode, String)> {
    match registration.update(|instance| instance.weight = weight).await {
        Ok(()) => {
            println!("weight {weight}");
            Ok(format!("weight {weight}\n"))
        }
        Err(error) => Err((axum::http::StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n"))),
    }
}
