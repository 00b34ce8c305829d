//! Calls `courseware_server`s, whichever are there, and shows who answered.

#[path = "../courseware_proto/mod.rs"]
mod proto;
#[path = "../common/reach.rs"]
mod reach;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use etcd_recipes::Session;
use etcd_recipes::service::{Balancer, Policy, ServiceChannel, Services};
use tokio::time::MissedTickBehavior;
use tonic::{Code, Request, Status};

use self::proto::courseware::GetRequest;
use self::proto::courseware::courseware_client::CoursewareClient;
use self::proto::greet::GreetRequest;
use self::proto::greet::greet_client::GreetClient;

/// How long one attempt may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Calls the service again and again, and shows who answered.
///
/// Prints `ready` when there is a server, then a line for each call: `call N answered by ADDRESS: WHAT`,
/// or `call N failed: WHY`. A call that a server did not answer is sent again, to another one.
///
/// Exit codes: 0 after the last call, 1 when etcd cannot be reached at the start, 2 for bad arguments.
#[derive(Debug, Parser)]
#[command(name = "courseware_client", verbatim_doc_comment)]
struct Args {
    /// Endpoints of etcd, separated by commas [default: 127.0.0.1:2379; if nothing answers there, an
    /// embedded server does while this runs].
    #[arg(long, env = "ETCD_ENDPOINTS", value_delimiter = ',')]
    endpoints: Vec<String>,

    /// The name of the service.
    #[arg(long, default_value = "courseware")]
    service: String,

    /// How to choose the server of a call.
    #[arg(long, value_enum, default_value_t = Choice::RoundRobin)]
    balancer: Choice,

    /// What to call.
    #[arg(long, value_enum, default_value_t = Method::Get)]
    call: Method,

    /// Time between two calls, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    interval_ms: u64,

    /// How often to try each call.
    #[arg(long, value_name = "N", default_value_t = 3)]
    attempts: u32,

    /// End after so many calls; 0 for never.
    #[arg(long, value_name = "N", default_value_t = 0)]
    count: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Choice {
    RoundRobin,
    Weighted,
    Random,
    LeastPending,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Method {
    Get,
    Morning,
    Night,
}

impl Choice {
    fn policy(self) -> Policy {
        match self {
            Self::RoundRobin => Policy::RoundRobin,
            Self::Weighted => Policy::WeightedRoundRobin,
            Self::Random => Policy::Random,
            Self::LeastPending => Policy::LeastPending,
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("courseware_client: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let (endpoints, _server) = reach::etcd(&args.endpoints).await?;
    let session = Session::connect(endpoints).await?;
    let discovery = Services::new(&session).discover(&args.service).open().await?;
    discovery.ready().await?;
    println!("ready");
    let channel = discovery.channel().balancer(Balancer::new(args.balancer.policy())).build();
    let mut ticks = tokio::time::interval(Duration::from_millis(args.interval_ms.max(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 1_u64.. {
        ticks.tick().await;
        match call(&channel, args, number).await {
            Ok((from, what)) => println!("call {number} answered by {from}: {what}"),
            Err(status) => println!("call {number} failed: {}", status.message()),
        }
        if number == args.count {
            break;
        }
    }
    drop((channel, discovery));
    session.close().await?;
    Ok(())
}

/// Calls until somebody answers, or the attempts are used up: these calls may be done twice.
async fn call(channel: &ServiceChannel, args: &Args, number: u64) -> Result<(String, String), Status> {
    let mut attempt = 1;
    loop {
        match once(channel, args.call, number).await {
            Err(status)
                if attempt < args.attempts
                    && matches!(status.code(), Code::Unavailable | Code::Cancelled) =>
            {
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// One attempt: who answered, and what.
async fn once(channel: &ServiceChannel, method: Method, number: u64) -> Result<(String, String), Status> {
    if let Method::Get = method {
        let answer = CoursewareClient::new(channel.clone()).get(limited(GetRequest { id: number })).await?;
        let answer = answer.into_inner();
        return Ok((answer.name, answer.code));
    }
    let mut client = GreetClient::new(channel.clone());
    let request = limited(GreetRequest { name: format!("caller {number}") });
    let answer = match method {
        Method::Night => client.night(request).await?,
        _ => client.morning(request).await?,
    };
    let answer = answer.into_inner();
    Ok((answer.from, answer.message))
}

fn limited<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(PATIENCE);
    request
}
