//! Opening a config cache, waiting for it, and writing through it.

use etcd_recipes::ConfigCache;
use futures::StreamExt as _;

use super::stage::{Stage, every_cut};

impl Stage<'_> {
    async fn config(&self) -> ConfigCache {
        ConfigCache::open(&self.ours, self.scope.key("config")).await.unwrap()
    }

    /// The value at etcd.
    async fn published(&self) -> Option<String> {
        let read = self.scope.client().get(self.scope.key("config/key"), None).await.unwrap();
        read.kvs().first().map(|kv| kv.value_str().unwrap().to_owned())
    }

    async fn unpublish(&self) {
        self.scope.client().delete(self.scope.key("config/key"), None).await.unwrap();
    }
}

pub(super) async fn dropped_open_of_a_config() {
    every_cut(async |stage, knife| {
        let opened = knife.of(ConfigCache::open(&stage.ours, stage.scope.key("config"))).await;
        assert!(opened?.unwrap().is_ready());
        Some(())
    })
    .await;
}

pub(super) async fn dropped_ready_of_a_config() {
    every_cut(async |stage, knife| {
        let config = ConfigCache::new(&stage.ours, stage.scope.key("config")).unwrap();
        let ready = knife.of(config.ready()).await;
        config.ready().await.unwrap();
        ready?.unwrap();
        Some(())
    })
    .await;
}

pub(super) async fn dropped_wait_for_a_revision() {
    every_cut(async |stage, knife| {
        let config = stage.config().await;
        let elsewhere = stage.scope.client().put(stage.scope.key("elsewhere"), "", None).await.unwrap();
        let revision = elsewhere.header().unwrap().revision();
        let waited = knife.of(config.wait_for(revision)).await;
        config.wait_for(revision).await.unwrap();
        stage.scope.client().delete(stage.scope.key("elsewhere"), None).await.unwrap();
        waited?.unwrap();
        Some(())
    })
    .await;
}

/// It is made or not made; and the next one comes after it.
pub(super) async fn dropped_publish_goes_on_or_ends() {
    every_cut(async |stage, knife| {
        let config = stage.config().await;
        let published = knife.of(config.publish("key", "cut")).await;
        config.publish("key", "next").await.unwrap();
        drop(config);
        stage.idle().await;
        assert_eq!(stage.published().await.as_deref(), Some("next"), "{:?}", knife.cut);
        stage.unpublish().await;
        published?.unwrap();
        Some(())
    })
    .await;
}

pub(super) async fn dropped_publish_of_a_type() {
    every_cut(async |stage, knife| {
        let config = stage.config().await;
        let published = knife.of(config.publish_as("key", "cut")).await;
        config.publish_as("key", "next").await.unwrap();
        drop(config);
        stage.idle().await;
        assert_eq!(stage.published().await.as_deref(), Some("\"next\""), "{:?}", knife.cut);
        stage.unpublish().await;
        published?.unwrap();
        Some(())
    })
    .await;
}

/// Either it is there, and the same again finds it; or the same again writes it.
pub(super) async fn dropped_publish_with_a_condition() {
    every_cut(async |stage, knife| {
        let config = stage.config().await;
        let published = knife.of(config.publish_if("key", 0, "cut")).await;
        stage.idle_with(1).await;
        let again = config.publish_if("key", 0, "again").await.unwrap();
        let expected = if again.is_some() { "again" } else { "cut" };
        assert_eq!(stage.published().await.as_deref(), Some(expected), "{:?}", knife.cut);
        stage.unpublish().await;
        assert!(published?.unwrap().is_some() && again.is_none());
        Some(())
    })
    .await;
}

pub(super) async fn dropped_delete_of_a_key() {
    every_cut(async |stage, knife| {
        let config = stage.config().await;
        config.publish("key", "old").await.unwrap();
        let deleted = knife.of(config.delete("key")).await;
        config.publish("key", "new").await.unwrap();
        drop(config);
        stage.idle().await;
        assert_eq!(stage.published().await.as_deref(), Some("new"), "{:?}", knife.cut);
        stage.unpublish().await;
        assert!(deleted?.unwrap().is_some());
        Some(())
    })
    .await;
}

pub(super) async fn dropped_delete_with_a_condition() {
    every_cut(async |stage, knife| {
        let config = stage.config().await;
        let old = config.publish("key", "old").await.unwrap();
        let deleted = knife.of(config.delete_if("key", old)).await;
        config.publish("key", "new").await.unwrap();
        drop(config);
        stage.idle().await;
        assert_eq!(stage.published().await.as_deref(), Some("new"), "{:?}", knife.cut);
        stage.unpublish().await;
        assert!(deleted?.unwrap().is_some());
        Some(())
    })
    .await;
}

/// What a dropped `next` would have said, the following one says.
pub(super) async fn dropped_next_change_is_not_lost() {
    every_cut(async |stage, knife| {
        let config = stage.config().await;
        let mut changes = config.changes("");
        stage.scope.client().put(stage.scope.key("config/key"), "new", None).await.unwrap();
        let first = knife.of(changes.next()).await;
        let cut = first.is_none();
        let change = match first {
            Some(change) => change,
            None => changes.next().await,
        };
        assert_eq!(change.unwrap().value(), Some(&b"new"[..]));
        stage.unpublish().await;
        assert_eq!(changes.next().await.unwrap().value(), None);
        (!cut).then_some(())
    })
    .await;
}
