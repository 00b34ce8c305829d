//! The config cache and the view below it: what is read, who is told, what is written, and every way to miss a change.

mod cycles;
mod followers;
mod gaps;
mod publish;
mod reads;
mod typed;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use etcd_client::{Client, DeleteOptions, GetOptions};
use etcd_recipes::{ConfigCache, ConfigChange, ConfigHandler, Session};

use crate::support::check::{Scope, eventually};
use crate::support::proxy::Proxy;
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::connect;

/// Keys, without their prefix, and values with their revisions.
type Contents = BTreeMap<Vec<u8>, (Vec<u8>, i64)>;

/// What etcd has, by a linearizable read.
async fn at_etcd(scope: &Scope) -> Contents {
    let prefix = format!("{}/", scope.name());
    let options = GetOptions::new().with_prefix();
    let mut client = scope.client().kv_client().max_decoding_message_size(64 * 1024 * 1024);
    let mut read = client.get(prefix.clone(), Some(options)).await.unwrap();
    let read = read.take_kvs().into_iter();
    read.map(|kv| (kv.key()[prefix.len()..].to_vec(), (kv.value().to_vec(), kv.mod_revision()))).collect()
}

fn cached(config: &ConfigCache) -> Contents {
    let snapshot = config.snapshot();
    let entries = snapshot.iter();
    entries.map(|entry| (entry.key().to_vec(), (entry.value().to_vec(), entry.revision()))).collect()
}

/// Waits until the cache has what etcd has.
async fn converges(scope: &Scope, config: &ConfigCache, limit: Duration) {
    let expected = at_etcd(scope).await;
    eventually(limit, "the cache has what etcd has", async || cached(config) == expected).await;
}

/// Writes as somebody else would: the revision.
async fn put(scope: &Scope, key: &str, value: &str) -> i64 {
    let answer = scope.client().put(scope.key(key), value, None).await.unwrap();
    answer.header().unwrap().revision()
}

async fn remove(scope: &Scope, key: &str) -> i64 {
    let answer = scope.client().delete(scope.key(key), None).await.unwrap();
    answer.header().unwrap().revision()
}

async fn wipe(scope: &Scope) {
    let (mut client, prefix): (Client, _) = (scope.client(), format!("{}/", scope.name()));
    client.delete(prefix, Some(DeleteOptions::new().with_prefix())).await.unwrap();
}

/// What a handler of all keys was told.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<ConfigChange>>>);

impl Told {
    fn by(config: &ConfigCache) -> (Self, ConfigHandler) {
        let told = Self::default();
        let list = told.clone();
        let handler = config.on_prefix("", move |change| {
            list.0.lock().unwrap().push(change.clone());
            Ok::<_, std::convert::Infallible>(())
        });
        (told, handler)
    }

    fn all(&self) -> Vec<ConfigChange> {
        self.0.lock().unwrap().clone()
    }

    /// What a reader knows who has only heard this. Panics if something was told twice, or went back.
    fn contents(&self) -> Contents {
        let mut known = Contents::new();
        for change in self.all() {
            let key = change.key().to_vec();
            match &change.after {
                None => _ = known.remove(&key).expect("a deletion of what was not there"),
                Some(after) => {
                    let before = known.insert(key, (after.value().to_vec(), after.revision()));
                    let newer = before.is_none_or(|(_, revision)| revision < after.revision());
                    assert!(newer, "told twice, or back in time: {change:?}");
                }
            }
        }
        known
    }

    async fn converges(&self, expected: &Contents) {
        eventually(PATIENCE, "the handler has heard everything", async || &self.contents() == expected).await;
    }
}

/// A server of its own, and a session that reaches it through a proxy.
struct Behind {
    server: Server,
    proxy: Proxy,
}

impl Behind {
    async fn start() -> Self {
        let server = Server::fast().await;
        let proxy = Proxy::start(server.endpoint()).await;
        Self { server, proxy }
    }

    async fn session(&self, scope: &Scope) -> Session {
        connect(scope, Session::builder([self.proxy.endpoint()]).ttl(Duration::from_secs(60))).await
    }
}
