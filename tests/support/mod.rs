//! The tools the tests are written with: etcd servers, a TCP proxy, faults inside the client
//! channel, leak checks, child processes and a cancellation harness. One concept per file.

pub(crate) mod binaries;
pub(crate) mod certificates;
pub(crate) mod check;
pub(crate) mod child;
pub(crate) mod clock;
pub(crate) mod cluster;
pub(crate) mod faults;
pub(crate) mod foreign;
pub(crate) mod holds;
pub(crate) mod line;
pub(crate) mod measure;
pub(crate) mod metrics;
pub(crate) mod needs;
pub(crate) mod poll;
pub(crate) mod ports;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod server;
pub(crate) mod sessions;
pub(crate) mod users;

use std::io::Write as _;
use std::panic::Location;
use std::sync::OnceLock;

use etcd_client::{Client, ConnectOptions};
use tokio::runtime::{Builder, Runtime};

use server::Server;

/// Whether everything is to run in full: rounds that take too long otherwise.
pub(crate) fn full() -> bool {
    std::env::var_os("ETCD_RECIPES_FULL").is_some()
}

/// How much of something a test does: all of it in full, otherwise few. That is added to the file that
/// `ETCD_RECIPES_SHORTENED` names, for `cargo xtask test` to tell what was shortened.
#[track_caller]
pub(crate) fn rounds<T: std::fmt::Debug>(few: T, all: T) -> T {
    if full() {
        return all;
    }
    let caller = Location::caller();
    add_line("ETCD_RECIPES_SHORTENED", &format!("{}:{}\t{few:?} of {all:?}", caller.file(), caller.line()));
    few
}

/// Adds a line to the file that a variable names, if it names one.
fn add_line(variable: &str, line: &str) {
    let Some(path) = std::env::var_os(variable) else { return };
    let file = std::fs::File::options().create(true).append(true).open(path);
    let added = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    added.unwrap_or_else(|error| panic!("cannot write to {variable}: {error}"));
}

static SHARED: OnceLock<Server> = OnceLock::new();

/// The one etcd of this test process for tests that do not hurt their server. Started at first use with
/// [`Server::fast`]; it dies with the process.
pub(crate) fn etcd() -> &'static Server {
    SHARED.get_or_init(|| {
        // A test's runtime must not be blocked on from inside, so the start is awaited elsewhere.
        let start = std::thread::spawn(|| background().block_on(Server::fast()));
        start.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether other tests use this server as well.
pub(crate) fn is_shared(server: &Server) -> bool {
    SHARED.get().is_some_and(|shared| std::ptr::eq(shared, server))
}

/// The tools' own runtime. What they run stays out of the task count of the test's runtime, and keeps going
/// while a test blocks its threads.
pub(crate) fn background() -> &'static Runtime {
    static BACKGROUND: OnceLock<Runtime> = OnceLock::new();
    BACKGROUND.get_or_init(|| {
        Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("test-tools")
            .enable_all()
            .build()
            .expect("no runtime for the test tools")
    })
}

/// A plain client whose connections live on the tools' runtime.
pub(crate) async fn client<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> Client {
    client_with(endpoints, ConnectOptions::new()).await
}

/// As [`client`], with options.
pub(crate) async fn client_with<E: Into<String>>(
    endpoints: impl IntoIterator<Item = E>,
    options: ConnectOptions,
) -> Client {
    let endpoints: Vec<String> = endpoints.into_iter().map(Into::into).collect();
    background()
        .spawn(Client::connect(endpoints, Some(options)))
        .await
        .expect("connecting panicked")
        .expect("cannot connect to etcd")
}
