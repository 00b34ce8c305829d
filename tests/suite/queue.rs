//! The queue: items in order, taken once or claimed, whoever else takes part and whatever happens on the way.

mod bounded;
mod claims;
mod dead;
mod interop;
mod items;
mod processes;
mod typed;

use std::time::Duration;

use etcd_client::GetOptions;
use etcd_recipes::{Claim, Item, Queue, Session};

use crate::support::check::{Scope, eventually};
use crate::support::server::PATIENCE;

/// What must not happen is waited for this long.
const SHORT: Duration = Duration::from_millis(300);

fn queue(session: &Session, scope: &Scope) -> Queue {
    Queue::new(session, scope.name()).unwrap()
}

async fn dequeue(queue: &Queue) -> Item {
    tokio::time::timeout(PATIENCE, queue.dequeue()).await.expect("no item").unwrap()
}

async fn claim(queue: &Queue) -> Claim {
    tokio::time::timeout(PATIENCE, queue.claim()).await.expect("no item to claim").unwrap()
}

/// Waits until a consumer has heard that this item is to be had, before all others.
async fn comes_first(queue: &Queue, value: &str) {
    eventually(PATIENCE, &format!("{value} comes first"), async || {
        queue.peek().await.unwrap().is_some_and(|item| item.value == value.as_bytes())
    })
    .await;
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// All bookkeeping keys of the queue.
async fn books(scope: &Scope) -> Vec<String> {
    let prefix = format!("_etcd-recipes/queue/{}/", scope.name());
    let options = GetOptions::new().with_prefix().with_keys_only();
    let answer = scope.client().get(prefix.as_str(), Some(options)).await.unwrap();
    answer.kvs().iter().map(|kv| text(&kv.key()[prefix.len()..]).to_owned()).collect()
}
