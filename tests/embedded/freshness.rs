//! How old what is known can be: an answer is no younger than its request.

use std::time::Duration;

use etcd_recipes::ConfigCache;
use etcd_recipes::embedded::{Fault, Server};
use tokio::time::{sleep, timeout};

#[tokio::test(start_paused = true)]
async fn a_list_is_as_old_as_its_request() {
    const LATE: Duration = Duration::from_secs(1);
    let server = Server::start();
    let link = server.link();
    let session = server.session(&link).await.unwrap().ttl(Duration::from_secs(60)).connect().await.unwrap();
    let (list, watch) = (link.inject("Range", Fault::Hold, 1), link.inject("Watch", Fault::Hold, 1));
    let opened = tokio::spawn(async move { ConfigCache::open(&session, "app").await });
    list.hit(1).await;
    sleep(LATE).await;
    list.release();
    let cache = opened.await.unwrap().unwrap();
    let age = cache.age().unwrap();
    assert!(age >= LATE, "the list was asked for {LATE:?} ago, and is said to be {age:?} old");
    assert_eq!(cache.stale_since(), None);
    // Until the watch says that nothing has come since.
    watch.release();
    let heard = async {
        while cache.age().unwrap() >= LATE {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(10), heard).await.expect("it stays old");
}
