//! Side by side with Go's `recipe.Queue`, by what it writes and reads.

use std::time::{SystemTime, UNIX_EPOCH};

use etcd_client::{Client, Compare, CompareOp, GetOptions, SortOrder, SortTarget, Txn, TxnOp};
use etcd_recipes::Error;

use super::{claim, dequeue, queue, text};
use crate::support::check::{Scope, eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::session;

/// Puts as Go does: the time in nanoseconds is the key.
async fn go_enqueue(scope: &Scope, value: &str) -> String {
    loop {
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let key = format!("{}/{nanos}", scope.name());
        let new = Compare::version(key.as_str(), CompareOp::Equal, 0);
        let put = Txn::new().when([new]).and_then([TxnOp::put(key.as_str(), value, None)]);
        if scope.client().txn(put).await.unwrap().succeeded() {
            return key;
        }
    }
}

/// Takes as Go does: the oldest by modification under the name, without a slash.
async fn go_dequeue(client: &mut Client, name: &str) -> Option<String> {
    loop {
        let options =
            GetOptions::new().with_prefix().with_limit(1).with_sort(SortTarget::Mod, SortOrder::Ascend);
        let found = client.get(name, Some(options)).await.unwrap();
        let kv = found.kvs().first()?;
        let same = Compare::mod_revision(kv.key(), CompareOp::Equal, kv.mod_revision());
        let take = Txn::new().when([same]).and_then([TxnOp::delete(kv.key(), None)]);
        if client.txn(take).await.unwrap().succeeded() {
            return Some(text(kv.value()).to_owned());
        }
    }
}

#[tokio::test]
async fn go_feeds_and_drains_in_one_order_with_us() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        for n in 0..20 {
            if n % 2 == 0 {
                go_enqueue(scope, &n.to_string()).await;
            } else {
                queue.enqueue(n.to_string()).await.unwrap();
            }
        }
        for n in 0..20 {
            let value = if n % 3 == 0 {
                go_dequeue(&mut scope.client(), scope.name()).await.unwrap()
            } else {
                text(&dequeue(&queue).await.value).to_owned()
            };
            assert_eq!(value, n.to_string());
        }
        assert_eq!(go_dequeue(&mut scope.client(), scope.name()).await, None);
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn go_takes_nothing_but_items_while_we_claim() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        queue.enqueue_all(["claimed", "rejected", "free"]).await.unwrap();
        let claimed = claim(&queue).await;
        claim(&queue).await.reject("bad").await.unwrap();
        let mut client = scope.client();
        assert_eq!(go_dequeue(&mut client, scope.name()).await.as_deref(), Some("claimed"));
        assert_eq!(go_dequeue(&mut client, scope.name()).await.as_deref(), Some("free"));
        assert_eq!(go_dequeue(&mut client, scope.name()).await, None, "nothing of ours is there");
        assert!(matches!(claimed.ack().await, Err(Error::Lost { .. })), "it was taken in spite of the claim");
        eventually(PATIENCE, "nothing is left of the claim", async || {
            super::books(scope).await.iter().all(|key| key.contains("dead") || key.contains("consumer"))
        })
        .await;
        for letter in queue.dead_letters().await.unwrap() {
            queue.purge(&letter).await.unwrap();
        }
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn foreign_keys_of_any_form_are_items() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        let strange = [&b""[..], b"a/b/c", b"\xff\xfe", b"claim/x", b"%2F"];
        for id in strange {
            let key = [scope.name().as_bytes(), b"/", id].concat();
            scope.client().put(key, id, None).await.unwrap();
        }
        for (n, id) in strange.iter().enumerate() {
            if n % 2 == 0 {
                let claimed = claim(&queue).await;
                assert_eq!(claimed.value(), *id);
                claimed.ack().await.unwrap();
            } else {
                assert_eq!(dequeue(&queue).await.value, *id);
            }
        }
        session.close().await.unwrap();
    })
    .await;
}
