//! Each mode of the proxy does what it says, seen from a client and from etcd.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::support::check::{eventually, scoped};
use crate::support::proxy::{Mode, Proxy};
use crate::support::server::PATIENCE;
use crate::support::{background, etcd};

const SHORT: Duration = Duration::from_millis(150);

/// A server that is only a socket, behind a proxy, with one connection through it: (client's end, server's
/// end).
async fn connected() -> (TcpListener, Proxy, TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::start(listener.local_addr().unwrap().to_string()).await;
    let client = connect(&proxy).await;
    let (server, _) = listener.accept().await.unwrap();
    (listener, proxy, client, server)
}

async fn connect(proxy: &Proxy) -> TcpStream {
    TcpStream::connect(proxy.endpoint().trim_start_matches("http://")).await.unwrap()
}

/// Writes on one end and reads the same on the other.
async fn passes(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"through").await.unwrap();
    let mut buffer = [0; 7];
    tokio::time::timeout(PATIENCE, to.read_exact(&mut buffer)).await.unwrap().unwrap();
    assert_eq!(&buffer, b"through");
}

/// Nothing arrives and the socket stays open.
async fn silent(end: &mut TcpStream) -> bool {
    tokio::time::timeout(SHORT, end.read(&mut [0; 16])).await.is_err()
}

/// Bytes pass if `open`, else they vanish.
async fn through_or_not(open: bool, from: &mut TcpStream, to: &mut TcpStream) {
    if open {
        return passes(from, to).await;
    }
    from.write_all(b"lost").await.unwrap();
    assert!(silent(to).await, "the hole let something through");
}

/// The socket is reset, not ended in order.
async fn reset(end: &mut TcpStream) {
    let read = tokio::time::timeout(PATIENCE, end.read(&mut [0; 16])).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn passes_bytes_and_ends() {
    let (_listener, proxy, mut client, mut server) = connected().await;
    passes(&mut client, &mut server).await;
    passes(&mut server, &mut client).await;
    client.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
    passes(&mut server, &mut client).await;
    assert_eq!(proxy.accepted(), 1);
}

#[tokio::test]
async fn drop_resets_everything() {
    let (_listener, proxy, mut client, mut server) = connected().await;
    passes(&mut client, &mut server).await;
    proxy.set(Mode::Drop).await;
    reset(&mut client).await;
    reset(&mut server).await;
    // The reset of a new connection may come while it is still being made.
    match TcpStream::connect(proxy.endpoint().trim_start_matches("http://")).await {
        Ok(mut second) => reset(&mut second).await,
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
}

#[tokio::test]
async fn reset_all_keeps_the_mode() {
    let (listener, proxy, mut client, mut server) = connected().await;
    passes(&mut client, &mut server).await;
    proxy.reset_all().await;
    reset(&mut client).await;
    let mut client = connect(&proxy).await;
    let (mut server, _) = listener.accept().await.unwrap();
    passes(&mut client, &mut server).await;
}

#[tokio::test]
async fn refuse_closes_the_listener() {
    let (listener, proxy, mut client, mut server) = connected().await;
    passes(&mut client, &mut server).await;
    proxy.set(Mode::Refuse).await;
    reset(&mut client).await;
    let address = proxy.endpoint();
    let refused = TcpStream::connect(address.trim_start_matches("http://")).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    proxy.set(Mode::Pass).await;
    let mut client = connect(&proxy).await;
    let (mut server, _) = listener.accept().await.unwrap();
    passes(&mut client, &mut server).await;
}

#[tokio::test]
async fn holes_swallow_one_way_or_both() {
    for (mode, to_server, to_client) in
        [(Mode::HoleToServer, false, true), (Mode::HoleToClient, true, false), (Mode::HoleBoth, false, false)]
    {
        let (listener, proxy, mut client, mut server) = connected().await;
        passes(&mut client, &mut server).await;
        proxy.set(mode).await;
        through_or_not(to_server, &mut client, &mut server).await;
        through_or_not(to_client, &mut server, &mut client).await;
        // What was lost does not come after healing: the connection is reset instead.
        proxy.set(Mode::Pass).await;
        reset(&mut client).await;
        reset(&mut server).await;
        let mut client = connect(&proxy).await;
        let (mut server, _) = listener.accept().await.unwrap();
        passes(&mut client, &mut server).await;
    }
}

/// A protocol would take what comes after it for whole.
#[tokio::test]
async fn nothing_comes_after_a_hole() {
    for _ in 0..200 {
        let (_listener, proxy, mut client, mut server) = connected().await;
        let flood = background().spawn(async move {
            for number in 0u32.. {
                if server.write_all(&number.to_be_bytes()).await.is_err() {
                    return;
                }
            }
        });
        let read = background().spawn(async move {
            let mut bytes = Vec::new();
            // Until it is reset.
            let _ = client.read_to_end(&mut bytes).await;
            bytes
        });
        proxy.set(Mode::HoleToClient).await;
        proxy.set(Mode::Drop).await;
        let bytes = tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap();
        let (numbers, _) = bytes.as_chunks::<4>();
        let gap = (0u32..).zip(numbers).find(|(expected, number)| expected.to_be_bytes() != **number);
        assert!(gap.is_none(), "not {gap:?}");
        flood.await.unwrap();
    }
}

#[tokio::test]
async fn a_hole_hides_the_end_of_a_socket() {
    let (_listener, proxy, client, mut server) = connected().await;
    proxy.set(Mode::HoleBoth).await;
    drop(client);
    assert!(silent(&mut server).await, "the end went through the hole");
    let mut later = connect(&proxy).await;
    later.write_all(b"hello?").await.unwrap();
    assert!(silent(&mut later).await, "a new connection is not swallowed");
}

#[tokio::test]
async fn delays_each_way() {
    let (_listener, proxy, mut client, mut server) = connected().await;
    let (to_server, to_client) = (Duration::from_millis(120), Duration::from_millis(240));
    proxy.set(Mode::Delay { to_server, to_client }).await;
    let begin = Instant::now();
    passes(&mut client, &mut server).await;
    assert!(begin.elapsed() >= to_server);
    let begin = Instant::now();
    passes(&mut server, &mut client).await;
    assert!(begin.elapsed() >= to_client);
}

#[tokio::test]
async fn etcd_takes_what_a_hole_hides_from_the_client() {
    scoped(async |scope| {
        let proxy = Proxy::start(etcd().endpoint()).await;
        let mut through = crate::support::client([proxy.endpoint()]).await;
        let key = scope.key("written");
        through.put(key.as_str(), "1", None).await.unwrap();

        // The answer is lost, the write is not.
        proxy.set(Mode::HoleToClient).await;
        let lost = tokio::time::timeout(SHORT, through.put(key.as_str(), "2", None)).await;
        assert!(lost.is_err(), "an answer came through the hole");
        let mut direct = scope.client();
        eventually(PATIENCE, "the write takes effect", async || {
            direct.get(key.as_str(), None).await.unwrap().kvs()[0].value() == b"2"
        })
        .await;

        // Nothing arrives; after healing the client works again.
        proxy.set(Mode::HoleToServer).await;
        let lost = tokio::time::timeout(SHORT, through.put(key.as_str(), "3", None)).await;
        assert!(lost.is_err(), "an answer came although nothing was asked");
        assert_eq!(direct.get(key.as_str(), None).await.unwrap().kvs()[0].value(), b"2");
        proxy.set(Mode::Pass).await;
        eventually(PATIENCE, "the client works again", async || {
            let write = through.put(key.as_str(), "4", None);
            tokio::time::timeout(Duration::from_secs(5), write).await.is_ok_and(|answer| answer.is_ok())
        })
        .await;
        assert_eq!(direct.get(key.as_str(), None).await.unwrap().kvs()[0].value(), b"4");
        direct.delete(key.as_str(), None).await.unwrap();
    })
    .await;
}
