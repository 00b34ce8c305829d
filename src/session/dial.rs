//! How connections to etcd are made.

use std::future::Future;
use std::io::{IoSlice, Result as IoResult};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::{Channel, Client, ConnectOptions};
use futures::future::BoxFuture;
use hyper::rt::{Executor, Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::HttpConnector;
use tonic::transport::{Endpoint, Uri};
use tower::ServiceExt as _;

#[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
use etcd_client::TlsOptions;

use super::runtime::Runtime;
use crate::error::{Error, Result};

/// etcd closes connections that ping while idle or more often than every 5 s.
const PING_EVERY: Duration = Duration::from_secs(10);
/// All of connecting, with the lookup of the name and TLS, is given up after this long. Not as short as the limit for an
/// address: a slow lookup would be thrown away each time.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// How much of all answers together may be on its way over a connection, in bytes. A caller who is not polled any more
/// does not take its answer, of which 2 MiB come; that is not to keep the others from theirs, so there is room for many.
const WINDOW: u32 = 256 << 20;
/// A connection is given up when a ping is not answered for this long.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// What all connections of a session have in common.
pub(crate) struct Dial {
    /// Name and password.
    pub(crate) user: Option<(String, String)>,
    #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
    pub(crate) tls: Option<TlsOptions>,
    /// How long it may take to connect.
    pub(crate) timeout: Duration,
}

impl Dial {
    /// Refuses what cannot be the address of a member.
    pub(crate) fn check(&self, address: &str) -> Result<()> {
        let refuse = |reason| Err(Error::InvalidOption { option: "endpoints", reason });
        if address.contains('@') {
            return refuse("one names a user; use `user`, which keeps the password out of messages".into());
        }
        let (scheme, rest) = address.split_once("://").unwrap_or((self.scheme(), address));
        let authority = rest.split('/').next().unwrap_or_default();
        // The last colon may be one of an IPv6 address, which ends with a bracket.
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
            _ => (authority, None),
        };
        let odd = |c: char| c.is_whitespace() || c.is_control();
        let usable = matches!(scheme, "http" | "https")
            && !host.is_empty()
            && !rest.contains(odd)
            && port.is_none_or(|port| port.parse::<u16>().is_ok());
        if !usable {
            return refuse(format!("{address:?} is neither host:port nor a URL with http or https"));
        }
        // A connection without TLS where TLS is wanted would send in clear what must not be.
        if scheme == "http" && self.scheme() == "https" {
            return refuse(format!("{address:?} says http, and there are TLS options"));
        }
        if scheme == "https" && !cfg!(any(feature = "tls", feature = "tls-aws-lc")) {
            return refuse(format!("{address:?} needs one of the features `tls` and `tls-aws-lc`"));
        }
        Ok(())
    }

    /// What an address that names none has.
    fn scheme(&self) -> &'static str {
        #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
        if self.tls.is_some() {
            return "https";
        }
        "http"
    }

    /// A client with one connection to one member, made when it is first used, in `runtime`. `under_way` counts its
    /// requests.
    ///
    /// A client that makes its connections itself has a balancer before them, which for one member is only work.
    pub(crate) async fn member(
        &self,
        address: &str,
        runtime: Arc<Runtime>,
        under_way: Arc<AtomicUsize>,
    ) -> Result<Client, etcd_client::Error> {
        let scheme = self.scheme();
        let url = if address.contains("://") { address.to_owned() } else { format!("{scheme}://{address}") };
        let endpoint = Endpoint::from(url.parse::<Uri>()?)
            .connect_timeout(CONNECT_LIMIT)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(false)
            .initial_connection_window_size(WINDOW)
            .executor(Gather { runtime, under_way });
        #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
        let endpoint = if url.starts_with("https") {
            endpoint.tls_config(self.tls.clone().unwrap_or_default())?
        } else {
            endpoint
        };
        let mut connector = HttpConnector::new();
        // The scheme says whether TLS comes on top.
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(self.timeout));
        let channel = endpoint.connect_with_connector_lazy(connector.map_response(OneBuffer));
        // Tokens are renewed by the session, which does it once for all who wait, and not again and again.
        Client::from_channel(Channel::Tonic(channel), Some(self.options())).await
    }

    /// A client that balances its requests over all members.
    pub(crate) async fn all(&self, addresses: &[String]) -> Result<Client, etcd_client::Error> {
        let options = self
            .options()
            .with_auto_token_refresh(true)
            .with_connect_timeout(self.timeout)
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            .with_keep_alive_while_idle(false);
        #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
        let options = match &self.tls {
            Some(tls) => options.with_tls(tls.clone()),
            None => options,
        };
        Client::connect(addresses, Some(options)).await
    }

    fn options(&self) -> ConnectOptions {
        let options = ConnectOptions::new().with_require_leader(true);
        match &self.user {
            Some((name, password)) => options.with_user(name, password),
            None => options,
        }
    }
}

/// A connection that does not offer to write several buffers with one call. HTTP/2 then copies payloads shorter than 1,024
/// bytes into the buffer it writes, otherwise only those shorter than 256, and each longer one is a system call of its
/// own (here two). A request to lock has 200 to 250 bytes, and the name three times. With TLS it changes nothing: that
/// always makes the offer.
struct OneBuffer<T>(T);

impl<T: Read + Unpin> Read for OneBuffer<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<IoResult<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<T: Write + Unpin> Write for OneBuffer<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<IoResult<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<IoResult<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<IoResult<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        false
    }

    // TLS, which does not ask, writes its records this way.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<IoResult<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }
}

/// Runs the tasks of a connection. While many requests are under way they let the tasks that are ready go first, so that
/// what those ask goes out together. Otherwise tokio's scheduler of several threads runs the connection right after each
/// request, and every one costs a system call at both ends: a tenth of all that a lock costs its process.
struct Gather {
    /// That of the session. Whoever makes the first request may do so in another runtime, which may end before.
    runtime: Arc<Runtime>,
    under_way: Arc<AtomicUsize>,
}

/// How many requests are many: with fewer there is little to gather, and an answer should not wait for other tasks.
const MANY: usize = 8;

/// How often the task that waits for one answer runs. Such a one writes nothing, and need not wait.
const SHORT: u8 = 2;

impl Executor<BoxFuture<'static, ()>> for Gather {
    fn execute(&self, task: BoxFuture<'static, ()>) {
        self.runtime.spawn_connection(Polite { task, under_way: self.under_way.clone(), runs: SHORT });
    }
}

struct Polite {
    task: BoxFuture<'static, ()>,
    under_way: Arc<AtomicUsize>,
    /// How often it may run before it lets others go first.
    runs: u8,
}

impl Future for Polite {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.runs == 0 && self.under_way.load(Ordering::Relaxed) >= MANY {
            self.runs = 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.runs = self.runs.saturating_sub(1);
        self.task.as_mut().poll(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Mutex;

    use http_body_util::Full;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
    use tokio::sync::Notify;
    use tokio_util::bytes::Bytes;

    use super::*;

    fn dial() -> Dial {
        Dial {
            user: None,
            #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
            tls: None,
            timeout: Duration::from_secs(1),
        }
    }

    #[test]
    fn an_address_that_needs_tls_is_refused_without_the_feature() {
        assert_eq!(dial().check("https://a:1").is_ok(), cfg!(any(feature = "tls", feature = "tls-aws-lc")));
        assert!(dial().check("http://a:1").is_ok() && dial().check("a:1").is_ok());
    }

    #[test]
    #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
    fn an_address_without_tls_is_refused_where_there_are_options_for_it() {
        let dial = Dial { tls: Some(TlsOptions::new()), ..dial() };
        let error = dial.check("http://a:1").unwrap_err().to_string();
        assert!(error.contains("`endpoints`") && error.contains("http://a:1"), "{error}");
        assert!(dial.check("https://a:1").is_ok() && dial.check("a:1").is_ok());
        assert_eq!(dial.scheme(), "https");
    }

    fn gather(requests: usize) -> Gather {
        Gather { runtime: Arc::new(Runtime::current()), under_way: Arc::new(AtomicUsize::new(requests)) }
    }

    /// In which order a connection's task, when it is woken, and one that was ready after it run.
    async fn order(requests: usize) -> Vec<&'static str> {
        let (wakes, ran) = (Arc::new(Notify::new()), Arc::new(Mutex::new(Vec::new())));
        let connection = {
            let (wakes, ran) = (wakes.clone(), ran.clone());
            async move {
                loop {
                    wakes.notified().await;
                    ran.lock().unwrap().push("connection");
                }
            }
        };
        gather(requests).execute(Box::pin(connection));
        for _ in 0..SHORT {
            tokio::task::yield_now().await;
            wakes.notify_one();
        }
        tokio::task::yield_now().await;
        ran.lock().unwrap().clear();
        wakes.notify_one();
        let request = ran.clone();
        tokio::spawn(async move { request.lock().unwrap().push("request") }).await.unwrap();
        tokio::task::yield_now().await;
        let ran = ran.lock().unwrap();
        ran.clone()
    }

    #[tokio::test]
    async fn a_connection_waits_for_those_who_are_ready_if_many_requests_are_under_way() {
        assert_eq!(order(MANY).await, ["request", "connection"]);
        assert_eq!(order(MANY - 1).await, ["connection", "request"]);
    }

    #[tokio::test]
    async fn the_task_of_one_request_waits_for_nobody() {
        let ran = Arc::new(Mutex::new(Vec::new()));
        let run = |who| {
            let ran = ran.clone();
            async move { ran.lock().unwrap().push(who) }
        };
        gather(MANY).execute(Box::pin(run("answer")));
        tokio::spawn(run("other")).await.unwrap();
        tokio::task::yield_now().await;
        assert_eq!(*ran.lock().unwrap(), ["answer", "other"]);
    }

    /// Counts what is written.
    struct Counted(tokio::io::DuplexStream, Arc<AtomicUsize>);

    impl AsyncRead for Counted {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<IoResult<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Counted {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<IoResult<usize>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Pin::new(&mut self.0).poll_write(cx, buf)
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<IoResult<usize>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
        }

        fn is_write_vectored(&self) -> bool {
            true
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<IoResult<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<IoResult<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    #[tokio::test]
    async fn requests_of_the_size_of_a_lock_go_out_together() {
        let (near, _far) = tokio::io::duplex(1 << 20);
        let writes = Arc::new(AtomicUsize::new(0));
        let io = OneBuffer(TokioIo::new(Counted(near, writes.clone())));
        let (mut requests, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        let pause = async || {
            for _ in 0..8 {
                tokio::task::yield_now().await;
            }
        };
        pause().await;
        // So much for the opening.
        writes.store(0, Ordering::Relaxed);
        let bodies = (0..8).map(|_| Full::new(Bytes::from_static(&[7; 300])));
        let sent: Vec<_> = bodies.map(|body| requests.send_request(http::Request::new(body))).collect();
        pause().await;
        let writes = writes.load(Ordering::Relaxed);
        assert!((1..sent.len() / 2).contains(&writes), "{writes} writes");
    }
}
