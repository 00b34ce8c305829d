//! Much traffic on the session's client, also when somebody does not read what he asked for: renewals are not behind it.

use std::time::Duration;

use etcd_client::{Client, WatchOptions};
use etcd_recipes::{Mutex, Session};
use futures::StreamExt as _;

use crate::support::check::scoped_on;
use crate::support::full;
use crate::support::holds::States;
use crate::support::server::Server;

const KEYS: usize = 10_000;

/// Writes all keys as fast as etcd takes them.
async fn write_all(client: &Client, prefix: &str) {
    let write = |number: usize| {
        let (mut client, key) = (client.clone(), format!("{prefix}{number}"));
        async move {
            // etcd refuses what is too much for it at once.
            while let Err(error) = client.put(key.as_str(), vec![b'x'; 1024], None).await {
                assert!(error.to_string().contains("too many requests"), "{error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    };
    futures::stream::iter((0..KEYS).map(write)).buffer_unordered(KEYS).collect::<()>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_writes_and_an_unread_watch_do_not_lose_a_short_lease() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let session =
            Session::builder([scope.endpoint()]).ttl(Duration::from_secs(2)).connect().await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        let states = States::of(&session);
        let guard = Mutex::new(&session, scope.key("lock")).unwrap().lock().await.unwrap();
        let prefix = format!("{}-burst/", scope.name());
        // Nobody reads this, so its events fill the windows of the connection.
        let options = Some(WatchOptions::new().with_prefix());
        let unread = session.client().watch(prefix.as_str(), options).await.unwrap();
        for _ in 0..if full() { 20 } else { 1 } {
            write_all(&session.client(), &prefix).await;
            // The next renewals meet what is left of it.
            tokio::time::sleep(Duration::from_secs(3)).await;
            assert!(guard.is_held());
            states.never_lost();
        }
        drop(unread);
        guard.unlock().await.unwrap();
        let options = Some(etcd_client::DeleteOptions::new().with_prefix());
        scope.client().delete(prefix, options).await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}
