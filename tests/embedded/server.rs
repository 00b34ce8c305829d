//! The embedded server in a test's hands, and what clients see of it.

use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp, WatchOptions};
use etcd_recipes::embedded::{Fault, Server};
use etcd_recipes::{Error, Mutex, Session};
use tokio::time::Instant;

/// A session with a TTL of ten seconds on a link of its own.
async fn session(server: &Server, link: &etcd_recipes::embedded::Link) -> Session {
    server.session(link).await.unwrap().ttl(Duration::from_secs(10)).connect().await.unwrap()
}

/// The documented way to see a holder lose its lease in the middle of its work, in less than 50 ms of real time.
#[tokio::test(start_paused = true)]
async fn a_holder_loses_its_lease_in_no_time() {
    let real = std::time::Instant::now();
    let server = Server::start();
    let link = server.link();
    let session = session(&server, &link).await;
    let guard = Mutex::new(&session, "reports").unwrap().lock().await.unwrap();
    let work = async {
        link.stall();
        tokio::time::sleep(Duration::from_secs(60)).await;
    };
    let began = Instant::now();
    assert!(guard.run(work).await.unwrap_err().is_lost());
    let took = began.elapsed();
    assert!(Duration::from_secs(6) < took && took < Duration::from_secs(10), "{took:?}");
    assert_eq!(server.keys("reports/").len(), 1, "the holder knows before etcd");
    assert!(real.elapsed() < Duration::from_millis(50), "{:?}", real.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_expired_lease_takes_its_keys_and_its_lock() {
    let server = Server::start();
    let (one, two) = (server.link(), server.link());
    let (first, second) = (session(&server, &one).await, session(&server, &two).await);
    let guard = Mutex::new(&first, "lock").unwrap().lock().await.unwrap();
    let waiter = tokio::spawn({
        let mutex = Mutex::new(&second, "lock").unwrap();
        async move { mutex.lock().await }
    });
    assert!(server.expire(first.lease_id().unwrap()));
    let next = waiter.await.unwrap().unwrap();
    assert!(next.token() > guard.token());
    guard.lost().await;
    assert!(!server.expire(1), "there is no such lease");
    next.unlock().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn expiry_waits_while_it_is_held() {
    let server = Server::start();
    let mut client = server.client().await.unwrap();
    let lease = client.lease_grant(5, None).await.unwrap().id();
    server.hold_expiry();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(server.leases(), [lease]);
    server.resume_expiry();
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(server.leases().is_empty());
}

#[tokio::test(start_paused = true)]
async fn faults_meet_the_requests_they_are_for() {
    let server = Server::start();
    let link = server.link();
    let mut client = link.client().await.unwrap();
    link.inject("Put", Fault::Refuse, 1);
    client.put("a", "1", None).await.unwrap_err();
    assert!(server.keys("a").is_empty());
    let lost = link.inject("Put", Fault::LoseAnswer, 1);
    client.put("a", "2", None).await.unwrap_err();
    assert_eq!((server.keys("a")[0].value.as_slice(), lost.hits()), (&b"2"[..], 1));
    let held = link.inject("Put", Fault::Hold, 1);
    let put = {
        let mut client = client.clone();
        tokio::spawn(async move { client.put("b", "3", None).await })
    };
    held.hit(1).await;
    // The caller gives up; the request is on its way all the same.
    put.abort();
    assert!(server.keys("b").is_empty());
    held.release();
    let arrived = async {
        while server.keys("b").is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(1), arrived).await.unwrap();
    let twice = link.inject("Put", Fault::Twice, 1);
    client.put("c", "4", None).await.unwrap();
    client.put("c", "5", None).await.unwrap();
    assert_eq!((server.keys("c")[0].value.as_slice(), twice.hits()), (&b"5"[..], 1));
    twice.release();
    let again = async {
        while server.keys("c")[0].value == b"5" {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(1), again).await.unwrap();
    assert_eq!(server.keys("c")[0].value, b"4");
}

#[tokio::test(start_paused = true)]
async fn a_cut_link_ends_its_streams_and_no_others() {
    let server = Server::start();
    let (one, two) = (server.link(), server.link());
    let watch = async |link: &etcd_recipes::embedded::Link| {
        let mut client = link.client().await.unwrap();
        let mut stream = client.watch("k", None).await.unwrap();
        assert!(stream.message().await.unwrap().unwrap().created());
        stream
    };
    let (mut cut, mut whole) = (watch(&one).await, watch(&two).await);
    assert_eq!((server.watches(), server.watch_streams()), (2, 2));
    one.cut();
    cut.message().await.unwrap_err();
    one.client().await.unwrap().get("k", None).await.unwrap_err();
    one.restore();
    one.client().await.unwrap().put("k", "v", None).await.unwrap();
    // It was cut once, and does not come back.
    assert!(!matches!(cut.message().await, Ok(Some(_))));
    assert_eq!(whole.message().await.unwrap().unwrap().events().len(), 1);
    // A stalled link swallows until it is restored.
    two.stall();
    one.client().await.unwrap().put("k", "w", None).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), whole.message()).await.unwrap_err();
    two.restore();
    assert_eq!(whole.message().await.unwrap().unwrap().events()[0].kv().unwrap().value(), b"w");
}

#[tokio::test(start_paused = true)]
async fn a_session_survives_a_cut_and_not_a_long_one() {
    let server = Server::start();
    let link = server.link();
    let session = session(&server, &link).await;
    let lease = session.lease_id();
    link.cut();
    tokio::time::sleep(Duration::from_secs(3)).await;
    link.restore();
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(session.lease_id(), lease);
    link.cut();
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(!session.is_alive());
    link.restore();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(session.is_alive() && session.lease_id() != lease);
    session.close().await.unwrap();
    assert!(server.leases().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_was_compacted_cannot_be_read_or_watched() {
    let server = Server::start();
    let mut client = server.client().await.unwrap();
    for value in ["1", "2", "3"] {
        client.put("k", value, None).await.unwrap();
    }
    server.compact(3).unwrap();
    assert!(server.compact(3).is_err() && server.compact(100).is_err());
    let old = client.get("k", Some(GetOptions::new().with_revision(2))).await.unwrap_err();
    assert!(old.to_string().contains("required revision has been compacted"), "{old}");
    let got = client.get("k", Some(GetOptions::new().with_revision(3))).await.unwrap();
    assert_eq!(got.kvs()[0].value(), b"2");
    let mut stream = client.watch("k", Some(WatchOptions::new().with_start_revision(2))).await.unwrap();
    let compacted = loop {
        let message = stream.message().await.unwrap().unwrap();
        if message.canceled() {
            break message.compact_revision();
        }
    };
    assert_eq!(compacted, 3);
}

#[tokio::test]
async fn a_thousand_watches_of_one_prefix_hear_everything() {
    let server = Server::start();
    let client = server.client().await.unwrap();
    let (mut requests, mut responses) =
        client.clone().watch("p/", Some(WatchOptions::new().with_prefix())).await.unwrap().split();
    for _ in 1..1000 {
        requests.watch("p/", Some(WatchOptions::new().with_prefix())).await.unwrap();
    }
    let mut created = 0;
    while created < 1000 {
        created += usize::from(responses.message().await.unwrap().unwrap().created());
    }
    client.clone().put("p/x", "", None).await.unwrap();
    let mut told = std::collections::BTreeSet::new();
    while told.len() < 1000 {
        let message = responses.message().await.unwrap().unwrap();
        assert_eq!(message.events().len(), 1);
        assert!(told.insert(message.watch_id()));
    }
}

#[tokio::test]
async fn it_listens_on_a_port_and_says_when_that_is_taken() {
    let server = Server::listen("127.0.0.1:0").await.unwrap();
    let address = server.address().unwrap();
    let taken = Server::listen(address).await.unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    let session = Session::connect([address.to_string()]).await.unwrap();
    let guard = Mutex::new(&session, "lock").unwrap().lock().await.unwrap();
    guard.unlock().await.unwrap();
    session.close().await.unwrap();
    drop(server);
    let gone =
        Session::builder([address.to_string()]).connect_timeout(Duration::from_secs(1)).connect().await;
    assert!(matches!(gone, Err(Error::Unreachable { .. })));
}

#[tokio::test]
async fn what_is_not_served_and_what_is_too_large_is_said() {
    let server = Server::start();
    let mut client = server.client().await.unwrap();
    let says = |error: etcd_client::Error| match error {
        etcd_client::Error::GRpcStatus(status) => (status.code() as i32, status.message().to_owned()),
        other => panic!("{other}"),
    };
    let (code, message) = says(client.hash().await.unwrap_err());
    assert!(code == 12 && message.contains("Maintenance/Hash"), "{message}");
    let (code, message) = says(client.user_list().await.unwrap_err());
    assert!(code == 12 && message.contains("Auth/UserList"), "{code} {message}");
    let value = vec![0; 1536 * 1024 + 1];
    let (code, message) = says(client.put("k", value, None).await.unwrap_err());
    assert_eq!((code, message.as_str()), (3, "etcdserver: request is too large"));
    let value = vec![0; 3 * 1024 * 1024];
    let (_, message) = says(client.put("k", value, None).await.unwrap_err());
    assert!(message.starts_with("grpc: received message larger than max"), "{message}");
    let many: Vec<_> = (0..129).map(|i| TxnOp::put(format!("{i}"), "", None)).collect();
    let (_, message) = says(client.txn(Txn::new().and_then(many)).await.unwrap_err());
    assert_eq!(message, "etcdserver: too many operations in txn request");
    let twice = [TxnOp::put("a", "", None), TxnOp::put("a", "", None)];
    let (_, message) = says(client.txn(Txn::new().and_then(twice)).await.unwrap_err());
    assert_eq!(message, "etcdserver: duplicate key given in txn request");
    let nothing = Txn::new().when([Compare::version("", CompareOp::Equal, 0)]);
    let (_, message) = says(client.txn(nothing).await.unwrap_err());
    assert_eq!(message, "etcdserver: key is not provided");
}

/// Ten thousand puts one after the other over memory, next to those of an etcd; and how soon each answers first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_faster_than_an_etcd() {
    const PUTS: usize = 10_000;
    async fn puts(mut client: Client, count: usize) -> Duration {
        let start = std::time::Instant::now();
        for _ in 0..count {
            client.put("k", "v", None).await.unwrap();
        }
        start.elapsed()
    }
    let start = std::time::Instant::now();
    let etcd = crate::support::server::Server::fast().await;
    let first = etcd.client().await;
    puts(first.clone(), 1).await;
    let etcd_start = start.elapsed();
    let start = std::time::Instant::now();
    let server = Server::start();
    puts(server.client().await.unwrap(), 1).await;
    let own_start = start.elapsed();
    // Fewer of etcd's, which take as long one by one.
    let theirs = puts(first, PUTS / 10).await * 10;
    let ours = puts(server.client().await.unwrap(), PUTS).await;
    println!("start: {own_start:?} / {etcd_start:?}, puts: {ours:?} / {theirs:?}");
    assert!(own_start * 20 <= etcd_start, "start: {own_start:?} / {etcd_start:?}");
    assert!(ours.as_secs_f64() <= 0.7 * theirs.as_secs_f64(), "puts: {ours:?} / {theirs:?}");
}
