//! A TCP proxy in front of a server, with failures that are switched at run time.

mod pipe;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::background;
use super::ports::free_port;

/// What the proxy does to the bytes and connections of its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Everything goes through.
    Pass,
    /// Connections are accepted and reset at once; those that are open are reset too.
    Drop,
    /// Nobody listens; connections that are open are reset.
    Refuse,
    /// Bytes from clients vanish; sockets stay open, also when a client closes its own.
    HoleToServer,
    /// Bytes from the server vanish; sockets stay open, also when the server closes its own.
    HoleToClient,
    /// Both holes: a half-open connection.
    HoleBoth,
    /// Every byte arrives this much later.
    Delay {
        /// On the way to the server.
        to_server: Duration,
        /// On the way to the client.
        to_client: Duration,
    },
}

impl Mode {
    fn is_hole(self) -> bool {
        matches!(self, Self::HoleToServer | Self::HoleToClient | Self::HoleBoth)
    }

    fn swallows(self, way: Way) -> bool {
        match way {
            Way::ToServer => matches!(self, Self::HoleToServer | Self::HoleBoth),
            Way::ToClient => matches!(self, Self::HoleToClient | Self::HoleBoth),
        }
    }

    fn delay(self, way: Way) -> Duration {
        match (self, way) {
            (Self::Delay { to_server, .. }, Way::ToServer) => to_server,
            (Self::Delay { to_client, .. }, Way::ToClient) => to_client,
            _ => Duration::ZERO,
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Way {
    ToServer,
    ToClient,
}

/// The running proxy. It lives on the tools' runtime, so a test may block its own. Dropping it resets all its
/// connections and closes the listener.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    orders: mpsc::UnboundedSender<(Order, oneshot::Sender<()>)>,
    accepted: Arc<AtomicUsize>,
}

#[derive(Debug)]
enum Order {
    Mode(Mode),
    ResetAll,
}

impl Proxy {
    /// A proxy in mode [`Mode::Pass`] in front of `endpoint` (`http://host:port` or `host:port`).
    pub(crate) async fn start(endpoint: impl AsRef<str>) -> Self {
        let target = endpoint.as_ref().trim_start_matches("http://").to_owned();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let (orders, inbox) = mpsc::unbounded_channel();
        let accepted = Arc::new(AtomicUsize::new(0));
        let (mode, _) = watch::channel(Mode::Pass);
        let control =
            Control { address, target, mode, accepted: accepted.clone(), connections: JoinSet::new() };
        background().spawn(control.run(inbox));
        let proxy = Self { address, orders, accepted };
        proxy.set(Mode::Pass).await; // Answered once the listener is open.
        proxy
    }

    /// The address for clients, `http://127.0.0.1:PORT`.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Changes the mode. When this returns, the new mode holds: [`Mode::Drop`] and [`Mode::Refuse`] have reset
    /// every connection; leaving a hole has reset every connection that was open in it, as bytes are missing
    /// in those.
    pub(crate) async fn set(&self, mode: Mode) {
        self.order(Order::Mode(mode)).await;
    }

    /// Resets every open connection and keeps the mode.
    pub(crate) async fn reset_all(&self) {
        self.order(Order::ResetAll).await;
    }

    /// How many connections were accepted so far.
    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    async fn order(&self, order: Order) {
        let (done, wait) = oneshot::channel();
        self.orders.send((order, done)).expect("the proxy has ended");
        wait.await.expect("the proxy has ended");
    }
}

struct Control {
    address: SocketAddr,
    target: String,
    mode: watch::Sender<Mode>,
    accepted: Arc<AtomicUsize>,
    connections: JoinSet<()>,
}

impl Control {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<(Order, oneshot::Sender<()>)>) {
        let mut listener = Some(self.listen().await);
        loop {
            let accept = async {
                match &listener {
                    Some(listener) => listener.accept().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                order = inbox.recv() => {
                    let Some((order, done)) = order else { return self.reset_all().await };
                    if let Order::Mode(mode) = order {
                        match mode {
                            Mode::Refuse => listener = None,
                            _ if listener.is_none() => listener = Some(self.listen().await),
                            _ => {}
                        }
                        let leaves_hole = self.mode.borrow().is_hole() && !mode.is_hole();
                        // Before the mode changes, or what comes after a hole would pass.
                        if leaves_hole || matches!(mode, Mode::Refuse | Mode::Drop) {
                            self.reset_all().await;
                        }
                        self.mode.send_replace(mode);
                    } else {
                        self.reset_all().await;
                    }
                    let _ = done.send(());
                }
                Ok((stream, _)) = accept => {
                    self.accepted.fetch_add(1, Ordering::SeqCst);
                    if *self.mode.borrow() == Mode::Drop {
                        let _ = stream.set_zero_linger();
                    } else {
                        let pipe = pipe::carry(stream, self.target.clone(), self.mode.subscribe());
                        self.connections.spawn(pipe);
                    }
                }
                Some(_) = self.connections.join_next(), if !self.connections.is_empty() => {}
            }
        }
    }

    async fn listen(&self) -> TcpListener {
        for _ in 0..500 {
            if let Ok(listener) = TcpListener::bind(self.address).await {
                return listener;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the proxy cannot listen on {}", self.address);
    }

    /// Aborting a connection's task drops its sockets, which are set to be reset by that.
    async fn reset_all(&mut self) {
        self.connections.shutdown().await;
    }
}
