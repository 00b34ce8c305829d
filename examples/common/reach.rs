//! Which etcd an example talks to.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::{Context as _, Result};
use etcd_recipes::embedded::Server;
use tokio::net::TcpStream;

/// Where etcd listens unless told otherwise.
const DEFAULT: &str = "127.0.0.1:2379";

/// The endpoints given, or the default. If nothing answers there, an embedded server does from now on, for this program
/// and for others, until it is dropped.
pub(crate) async fn etcd(given: &[String]) -> Result<(Vec<String>, Option<Server>)> {
    if !given.is_empty() {
        return Ok((given.to_vec(), None));
    }
    let answers = tokio::time::timeout(Duration::from_millis(500), TcpStream::connect(DEFAULT)).await;
    let server = match answers {
        Ok(Ok(_)) => None,
        _ => match Server::listen(DEFAULT).await {
            // Somebody else was faster.
            Err(error) if error.kind() == ErrorKind::AddrInUse => None,
            server => Some(
                server
                    .with_context(|| format!("no etcd answers on {DEFAULT}, and none can be served there"))?,
            ),
        },
    };
    if server.is_some() {
        eprintln!("No etcd on {DEFAULT}: serving one there, in memory, for as long as this program runs.");
    }
    Ok((vec![DEFAULT.into()], server))
}
