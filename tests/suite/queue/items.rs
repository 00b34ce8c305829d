//! Put in, taken out, looked at.

use std::time::Duration;

use etcd_client::{DeleteOptions, GetOptions};
use etcd_recipes::{Error, Mutex, Queue, Session};

use super::{SHORT, books, dequeue, queue, text};
use crate::support::check::{eventually, scoped, scoped_on};
use crate::support::proxy::{Mode, Proxy};
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::{connect, session, waits};

#[tokio::test]
async fn an_item_is_one_key_without_a_lease_and_nothing_else_is_there() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        let revision = queue.enqueue("hello").await.unwrap();
        let options = GetOptions::new().with_prefix();
        let found = scope.client().get(scope.name(), Some(options)).await.unwrap();
        let [kv] = found.kvs() else { panic!("{:?}", scope.keys().await) };
        assert_eq!((kv.value(), kv.lease(), kv.create_revision()), (&b"hello"[..], 0, revision));
        let item = dequeue(&queue).await;
        assert_eq!((item.key.as_slice(), item.create_revision), (kv.key(), revision));
        assert_eq!(item.value, b"hello");
        assert!(!format!("{item:?} {queue:?}").contains("hello"));
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn items_come_in_the_order_of_commit() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [ours, theirs] = [&a, &b].map(|session| queue(session, scope));
        for n in 0..10 {
            let queue = if n % 3 == 0 { &theirs } else { &ours };
            queue.enqueue(format!("{n:03}")).await.unwrap();
        }
        let batch: Vec<String> = (10..120).map(|n| format!("{n:03}")).collect();
        let revision = ours.enqueue_all(batch).await.unwrap();
        assert!(theirs.enqueue("120").await.unwrap() > revision);
        assert_eq!(ours.length().await.unwrap(), 121);
        assert_eq!(theirs.peek().await.unwrap().unwrap().value, b"000");
        for n in 0..121 {
            assert_eq!(text(&dequeue(&ours).await.value), format!("{n:03}"));
        }
        assert_eq!(ours.length().await.unwrap(), 0);
        assert_eq!(theirs.peek().await.unwrap(), None);
        assert!(books(scope).await.iter().all(|key| key.contains("consumer")), "{:?}", books(scope).await);
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_waiting_call_gets_what_comes() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [ours, theirs] = [&a, &b].map(|session| queue(session, scope));
        let mut waiting = Box::pin(ours.dequeue());
        assert!(waits(SHORT, &mut waiting).await);
        theirs.enqueue("late").await.unwrap();
        assert_eq!(waiting.await.unwrap().value, b"late");
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn try_dequeue_never_misses_what_was_there_before() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [ours, theirs] = [&a, &b].map(|session| queue(session, scope));
        assert_eq!(ours.try_dequeue().await.unwrap(), None);
        for n in 0..50 {
            theirs.enqueue(n.to_string()).await.unwrap();
            let item = ours.try_dequeue().await.unwrap().expect("it was enqueued before");
            assert_eq!(text(&item.value), n.to_string());
            assert_eq!(ours.try_dequeue().await.unwrap(), None);
        }
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn many_consumers_take_each_item_once() {
    scoped(async |scope| {
        let producer = session(scope).await;
        let queue_in = queue(&producer, scope);
        let values: Vec<String> = (0..600).map(|n| format!("{n:04}")).collect();
        for batch in values.chunks(100) {
            queue_in.enqueue_all(batch.to_vec()).await.unwrap();
        }
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let session = session(scope).await;
            let queue = queue(&session, scope);
            tasks.spawn(async move {
                let mut taken = Vec::new();
                while let Some(item) = queue.try_dequeue().await.unwrap() {
                    taken.push(text(&item.value).to_owned());
                }
                session.close().await.unwrap();
                taken
            });
        }
        let taken = tasks.join_all().await;
        for one in &taken {
            assert!(one.windows(2).all(|pair| pair[0] < pair[1]), "each consumer takes in order");
        }
        let mut all = taken.concat();
        all.sort();
        assert_eq!(all, values);
        producer.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn consumers_that_wait_share_what_comes() {
    scoped(async |scope| {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..3 {
            let session = session(scope).await;
            let queue = queue(&session, scope);
            tasks.spawn(async move {
                let mut taken = 0;
                while dequeue(&queue).await.value != b"end" {
                    taken += 1;
                }
                session.close().await.unwrap();
                taken
            });
        }
        let producer = session(scope).await;
        let queue = queue(&producer, scope);
        eventually(Duration::from_secs(20), "three consumers wait", async || books(scope).await.len() == 3)
            .await;
        for n in 0..90 {
            queue.enqueue(n.to_string()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        queue.enqueue_all(["end"; 3]).await.unwrap();
        let taken = tasks.join_all().await;
        assert_eq!(taken.iter().sum::<i32>(), 90);
        assert!(taken.iter().all(|taken| *taken > 5), "{taken:?}");
        producer.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_item_left_to_a_consumer_that_does_not_take_it_is_taken_by_another() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        // A consumer that says that it waits, and does nothing.
        for n in 0..8 {
            let key = format!("_etcd-recipes/queue/{}/work/consumer/dead-{n}", scope.name());
            scope.client().put(key, "", None).await.unwrap();
        }
        let mut waiting = Box::pin(queue.dequeue());
        assert!(waits(SHORT, &mut waiting).await);
        queue.enqueue("left").await.unwrap();
        let begun = std::time::Instant::now();
        assert_eq!(waiting.await.unwrap().value, b"left");
        assert!(begun.elapsed() < Duration::from_secs(5));
        let options = etcd_client::DeleteOptions::new().with_prefix();
        let prefix = format!("_etcd-recipes/queue/{}/", scope.name());
        scope.client().delete(prefix, Some(options)).await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn limits_are_told_before_anything_is_sent() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        let large = vec![b'x'; 1536 * 1024 - 3 * 8 * 1024];
        queue.enqueue(large.clone()).await.unwrap();
        assert_eq!(dequeue(&queue).await.value, large);
        let larger = [large, vec![b'x']].concat();
        assert!(matches!(queue.enqueue(larger.clone()).await, Err(Error::TooLarge { .. })));
        assert!(matches!(queue.enqueue_all([larger]).await, Err(Error::TooLarge { .. })));
        let half = vec![b'x'; 800 * 1024];
        assert!(matches!(queue.enqueue_all([half.clone(), half]).await, Err(Error::TooLarge { .. })));
        assert!(matches!(queue.enqueue_all(vec!["x"; 125]).await, Err(Error::TooLarge { .. })));
        assert_eq!(queue.length().await.unwrap(), 0);
        queue.enqueue_all(vec!["x"; 124]).await.unwrap();
        assert_eq!(queue.length().await.unwrap(), 124);
        queue.enqueue_all(Vec::<String>::new()).await.unwrap();
        for _ in 0..124 {
            dequeue(&queue).await;
        }
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn unusable_names_and_options_are_refused() {
    scoped(async |scope| {
        let session = session(scope).await;
        for name in [&b""[..], b"a\0b", &[b'x'; 1025], b"_etcd-recipes", b"_etcd-recipes/queue/a/work"] {
            assert!(matches!(Queue::new(&session, name), Err(Error::InvalidName { .. })), "{name:?}");
        }
        // Names whose keys would be within each other's.
        let used = queue(&session, scope);
        let _again = queue(&session, scope);
        for name in [scope.key("below"), format!("{}/", scope.name())] {
            assert!(matches!(Queue::new(&session, &name), Err(Error::InvalidName { .. })), "{name}");
            assert!(matches!(Mutex::new(&session, &name), Err(Error::InvalidName { .. })), "{name}");
        }
        assert!(matches!(Mutex::new(&session, scope.name()), Err(Error::InvalidName { .. })));
        drop((used, _again));
        let mutex = Mutex::new(&session, scope.key("below")).unwrap();
        assert!(matches!(Queue::new(&session, scope.name()), Err(Error::InvalidName { .. })));
        drop(mutex);
        let builder = || Queue::builder(&session, scope.name());
        for wrong in [
            builder().bound(0),
            builder().max_attempts(0),
            builder().time_limit(Duration::ZERO),
            builder().once_window(Duration::from_millis(999)),
        ] {
            assert!(matches!(wrong.build(), Err(Error::InvalidOption { .. })));
        }
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_closed_session_ends_who_waits() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        let mut waiting = Box::pin(queue.dequeue());
        assert!(waits(SHORT, &mut waiting).await);
        session.close().await.unwrap();
        assert!(matches!(waiting.await, Err(Error::Closed)));
        assert!(matches!(queue.dequeue().await, Err(Error::Closed)));
        assert!(matches!(queue.enqueue("x").await, Err(Error::Closed)));
    })
    .await;
}

#[tokio::test]
async fn a_consumer_goes_on_after_compaction_and_with_the_next_lease() {
    scoped(async |scope| {
        let builder = Session::builder([scope.endpoint()]).ttl(Duration::from_secs(2));
        let session = connect(scope, builder).await;
        let queue = queue(&session, scope);
        queue.enqueue("1").await.unwrap();
        assert_eq!(dequeue(&queue).await.value, b"1");
        let mut waiting = Box::pin(queue.dequeue());
        assert!(waits(SHORT, &mut waiting).await);
        scope.client().lease_revoke(session.lease_id().unwrap()).await.unwrap();
        crate::support::sessions::generation(scope, &session, 2).await;
        queue.enqueue("2").await.unwrap();
        assert_eq!(waiting.await.unwrap().value, b"2");
        session.close().await.unwrap();
    })
    .await;
}

/// What a consumer missed it reads again, page by page, while it hears of other things all the time.
#[tokio::test]
async fn a_busy_consumer_makes_up_for_what_it_missed() {
    const ITEMS: usize = 1200;
    let server = Server::fast().await;
    let proxy = Proxy::start(server.endpoint()).await;
    scoped_on(&server, async |scope| {
        let builder = Session::builder([proxy.endpoint()]).ttl(Duration::from_secs(60));
        let session = connect(scope, builder).await;
        let queue = queue(&session, scope);
        let mut waiting = Box::pin(queue.dequeue());
        assert!(waits(SHORT, &mut waiting).await);
        proxy.set(Mode::Refuse).await;
        let mut client = scope.client();
        for item in 0..ITEMS {
            client.put(scope.key(&format!("{item:04}")), "x", None).await.unwrap();
        }
        server.compact().await;
        let delay = Duration::from_millis(50);
        proxy.set(Mode::Delay { to_server: delay, to_client: delay }).await;
        let noise = format!("_etcd-recipes/queue/{}/work/noise", scope.name());
        let mut noisy = scope.client();
        let making = async {
            loop {
                noisy.put(noise.as_str(), "", None).await.unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let first = tokio::select! {
            first = tokio::time::timeout(PATIENCE / 6, waiting) => first.expect("it never reads to the end"),
            () = making => unreachable!(),
        };
        assert_eq!(first.unwrap().key, scope.key("0000").into_bytes());
        let all = DeleteOptions::new().with_prefix();
        client.delete(scope.key(""), Some(all)).await.unwrap();
        client.delete(noise.as_str(), None).await.unwrap();
        proxy.set(Mode::Pass).await;
        session.close().await.unwrap();
    })
    .await;
}
