//! A server that asks for passwords.

use etcd_client::{Client, ConnectOptions};

use super::needs::{Needs, asked_for};
use super::server::{Options, Server};

const ROOT: &str = "root:the-root-password";

/// A server with users. Authentication is turned on and off by the test: what checks for leaks has no password.
#[derive(Debug)]
pub(crate) struct Guarded {
    pub(crate) server: Server,
}

impl Guarded {
    /// With a root user, and authentication still off.
    pub(crate) async fn start() -> Self {
        Self::with(Options::fast()).await
    }

    /// As [`start`](Self::start), with options.
    pub(crate) async fn with(options: Options) -> Self {
        asked_for(Needs::Users);
        // A login costs etcd 60 ms of processor time otherwise, and there are many here.
        let options = options.arg("--bcrypt-cost=4");
        let guarded = Self { server: Server::with(options).await };
        guarded.server.ctl(["user", "add", ROOT]).await;
        guarded.server.ctl(["user", "grant-role", "root", "root"]).await;
        guarded
    }

    /// Turns it on.
    pub(crate) async fn on(&self) {
        self.server.ctl(["auth", "enable"]).await;
    }

    /// Turns it off.
    pub(crate) async fn off(&self) {
        self.ctl(&["auth", "disable"]).await;
    }

    /// A client that is root.
    pub(crate) async fn root(&self) -> Client {
        let (name, password) = ROOT.split_once(':').expect("a name and a password");
        let options = ConnectOptions::new().with_user(name, password);
        super::client_with([self.server.endpoint()], options).await
    }

    /// Runs `etcdctl` as root.
    pub(crate) async fn ctl(&self, args: &[&str]) -> String {
        self.server.ctl(["--user", ROOT].into_iter().chain(args.iter().copied())).await
    }

    /// Adds a user that may read and write what is under these prefixes.
    pub(crate) async fn user(&self, name: &str, password: &str, prefixes: &[&str]) {
        self.server.ctl(["role", "add", name]).await;
        for prefix in prefixes {
            self.server.ctl(["role", "grant-permission", name, "readwrite", "--prefix=true", prefix]).await;
        }
        self.server.ctl(["user", "add", &format!("{name}:{password}")]).await;
        self.server.ctl(["user", "grant-role", name, name]).await;
    }
}
