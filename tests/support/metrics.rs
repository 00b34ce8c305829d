//! What a server counted, from its `/metrics`, and the plain HTTP to get it.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// One reading of a server's counters.
#[derive(Debug, Clone)]
pub(crate) struct Metrics(String);

impl Metrics {
    /// Reads them from a server's client port.
    pub(crate) async fn read(port: u16) -> Self {
        Self(get(port, "/metrics", Duration::from_secs(10)).await.expect("no answer from /metrics"))
    }

    /// Calls begun of one gRPC method (a stream is one), for example `Txn`.
    pub(crate) fn calls(&self, method: &str) -> u64 {
        self.sum("grpc_server_started_total", method)
    }

    /// Messages the server sent in one gRPC method, for example `Watch`.
    pub(crate) fn messages_sent(&self, method: &str) -> u64 {
        self.sum("grpc_server_msg_sent_total", method)
    }

    /// Messages the server received in one gRPC method, for example `LeaseKeepAlive`.
    pub(crate) fn messages_received(&self, method: &str) -> u64 {
        self.sum("grpc_server_msg_received_total", method)
    }

    /// Any metric without labels, for example `etcd_debugging_mvcc_watcher_total`.
    pub(crate) fn value(&self, name: &str) -> Option<f64> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
    }

    /// The whole text.
    pub(crate) fn text(&self) -> &str {
        &self.0
    }

    fn sum(&self, counter: &str, method: &str) -> u64 {
        let label = format!("grpc_method=\"{method}\"");
        let lines = self.0.lines().filter(|line| {
            line.strip_prefix(counter).is_some_and(|rest| rest.starts_with('{')) && line.contains(&label)
        });
        // Counters are whole numbers, in Go's notation for floats (1e+06).
        let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        values.map(|value| value as u64).sum()
    }
}

/// The body of an answer with status 200, else `None`.
pub(crate) async fn get(port: u16, path: &str, timeout: Duration) -> Option<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok()?;
        let answer = String::from_utf8(answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        (head.split(' ').nth(1) == Some("200")).then(|| body.to_owned())
    };
    tokio::time::timeout(timeout, exchange).await.ok().flatten()
}
