//! The members of the cluster, one connection each, and which of them is used now.
//!
//! A balanced channel over all members would send a share of the calls to a dead one and fail them at once. Here calls
//! stay with one member until it fails, and then go to the next.

use std::sync::atomic::{AtomicUsize, Ordering};

use etcd_client::{Client, ConnectOptions};
use tokio::sync::OnceCell;

use super::runtime::{Backoff, Runtime};
use crate::error::{Error, Result};

/// A set of connections. A session has two: one for requests and watches, one for keepalives, so that a burst of data
/// on the first cannot delay the second.
pub(crate) struct Endpoints {
    members: Vec<Member>,
    current: AtomicUsize,
    options: Option<ConnectOptions>,
}

struct Member {
    name: String,
    client: OnceCell<Client>,
}

impl Endpoints {
    /// Connections of our own, made when they are first used.
    pub(crate) fn dial(names: &[String], options: ConnectOptions) -> Self {
        let member = |name: &String| Member { name: name.clone(), client: OnceCell::new() };
        Self {
            members: names.iter().map(member).collect(),
            current: AtomicUsize::new(0),
            options: Some(options),
        }
    }

    /// The one client that the user made; which member it talks to is its own affair.
    pub(crate) fn given(client: Client) -> Self {
        let member = Member { name: "the given client".into(), client: OnceCell::new_with(Some(client)) };
        Self { members: vec![member], current: AtomicUsize::new(0), options: None }
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.members.iter().map(|member| member.name.clone()).collect()
    }

    /// The index of the member used now.
    pub(crate) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Moves on from a member that failed, unless somebody else did already.
    pub(crate) fn avoid(&self, index: usize) {
        let next = (index + 1) % self.members.len();
        let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Goes on with a member that answers.
    pub(crate) fn prefer(&self, index: usize) {
        self.current.store(index, Ordering::Relaxed);
    }

    /// The client of member `index`. The first call may log in; the caller bounds its time.
    pub(crate) async fn client(&self, index: usize) -> Result<&Client, etcd_client::Error> {
        let member = &self.members[index % self.members.len()];
        // Boxed, because it is large and rarely runs, and every request's future contains it.
        let connect = || Box::pin(Client::connect([member.name.as_str()], self.options.clone()));
        member.client.get_or_try_init(connect).await
    }

    /// A client for the user's own requests, over all members. It may have to log in, and a member may be dead, so it
    /// is tried until the caller's time is up; `last` keeps the last failure.
    pub(crate) async fn for_user(&self, runtime: &Runtime, last: &mut Option<etcd_client::Error>) -> Client {
        let mut backoff = Backoff::of_requests();
        loop {
            let connected = match &self.options {
                None => self.client(0).await.cloned(),
                Some(options) => Box::pin(Client::connect(self.names(), Some(options.clone()))).await,
            };
            match connected {
                Ok(client) => return client,
                Err(error) => *last = Some(error),
            }
            backoff.wait(runtime).await;
        }
    }
}

/// Refuses what cannot be the address of a member.
pub(crate) fn check(endpoint: &str) -> Result<()> {
    let refuse = |reason| Err(Error::InvalidOption { option: "endpoints", reason });
    if endpoint.contains('@') {
        return refuse("one names a user; use `user`, which keeps the password out of messages".into());
    }
    let (scheme, address) = endpoint.split_once("://").unwrap_or(("http", endpoint));
    let authority = address.split('/').next().unwrap_or_default();
    // The last colon may be one of an IPv6 address, which ends with a bracket.
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let odd = |c: char| c.is_whitespace() || c.is_control();
    let usable = matches!(scheme, "http" | "https")
        && !host.is_empty()
        && !address.contains(odd)
        && port.is_none_or(|port| port.parse::<u16>().is_ok());
    if usable {
        Ok(())
    } else {
        refuse(format!("{endpoint:?} is neither host:port nor a URL with http or https"))
    }
}

// By hand: the options hold a password.
impl std::fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoints").field("members", &self.names()).finish_non_exhaustive()
    }
}
