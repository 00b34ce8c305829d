//! One connection through the proxy.

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::{Mode, Way};

/// Both ends of a connection. Dropping them is a reset, unless it ended in order.
struct Ends {
    client: TcpStream,
    server: TcpStream,
    in_order: bool,
}

impl Drop for Ends {
    fn drop(&mut self) {
        if !self.in_order {
            let _ = (self.client.set_zero_linger(), self.server.set_zero_linger());
        }
    }
}

/// Carries one connection until both ways ended.
pub(super) async fn carry(client: TcpStream, target: String, mode: watch::Receiver<Mode>) {
    let Ok(server) = TcpStream::connect(target).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let mut ends = Ends { client, server, in_order: false };
    // Borrowed halves: owned ones would end the connection in order when an abort drops them.
    let Ends { client, server, .. } = &mut ends;
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let both = tokio::try_join!(
        one_way(from_client, to_server, mode.clone(), Way::ToServer),
        one_way(from_server, to_client, mode, Way::ToClient),
    );
    ends.in_order = both.is_ok();
}

/// One side broke: the whole connection is to be reset.
struct Broken;

/// Reads on one side while what was read before waits for its time on the other.
async fn one_way(
    from: ReadHalf<'_>,
    to: WriteHalf<'_>,
    mode: watch::Receiver<Mode>,
    way: Way,
) -> Result<(), Broken> {
    let (queue, delayed) = mpsc::channel::<(Instant, Vec<u8>)>(256);
    tokio::try_join!(read_side(from, queue, mode.clone(), way), write_side(to, delayed, mode, way))?;
    Ok(())
}

async fn read_side(
    from: ReadHalf<'_>,
    queue: mpsc::Sender<(Instant, Vec<u8>)>,
    mode: watch::Receiver<Mode>,
    way: Way,
) -> Result<(), Broken> {
    let mut due = Instant::now();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = match from.readable().await.and_then(|()| from.try_read(&mut buffer)) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            read => read,
        };
        let now = *mode.borrow();
        if now.swallows(way) {
            if matches!(read, Ok(1..)) {
                continue;
            }
            return std::future::pending().await; // The end vanishes as well.
        }
        let count = read.map_err(|_| Broken)?;
        due = due.max(Instant::now() + now.delay(way));
        // An empty chunk is the end.
        queue.send((due, buffer[..count].to_vec())).await.map_err(|_| Broken)?;
        if count == 0 {
            return Ok(());
        }
    }
}

async fn write_side(
    mut to: WriteHalf<'_>,
    mut delayed: mpsc::Receiver<(Instant, Vec<u8>)>,
    mode: watch::Receiver<Mode>,
    way: Way,
) -> Result<(), Broken> {
    while let Some((due, bytes)) = delayed.recv().await {
        if due > Instant::now() {
            tokio::time::sleep_until(due).await;
        }
        let end = bytes.is_empty();
        if mode.borrow().swallows(way) {
            if end {
                return std::future::pending().await;
            }
            continue;
        }
        let written = if end { to.shutdown().await } else { to.write_all(&bytes).await };
        if written.is_err() {
            // In a hole the other side must not learn of it.
            if mode.borrow().is_hole() {
                return std::future::pending().await;
            }
            return Err(Broken);
        }
        if end {
            return Ok(());
        }
    }
    Ok(())
}
