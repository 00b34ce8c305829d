//! Registering, updating and deregistering an instance, and following the instances of a service.

use std::time::Duration;

use etcd_recipes::service::{Discovery, Instance, Registration, Services, formats};
use futures::StreamExt as _;

use super::stage::{PATIENCE, Stage, every_cut};
use crate::support::check::eventually;

impl Stage<'_> {
    fn services(&self) -> Services {
        Services::with_format(&self.ours, formats::Json::under(self.scope.key("services/")))
    }

    fn instance() -> Instance {
        Instance::new("service", "10.0.0.1:80")
    }

    async fn registration(&self) -> Registration {
        self.services().register(Self::instance()).await.unwrap()
    }

    async fn discovery(&self) -> Discovery {
        self.services().discover("service").open().await.unwrap()
    }

    async fn is_registered(&self) -> bool {
        let key = self.scope.key("services/service/10.0.0.1:80");
        !self.scope.client().get(key, None).await.unwrap().kvs().is_empty()
    }

    async fn gone(&self) {
        eventually(PATIENCE, "it is deregistered", async || !self.is_registered().await).await;
    }
}

pub(super) async fn dropped_register_is_undone() {
    every_cut(async |stage, knife| {
        let registered = knife.of(stage.services().register(Stage::instance())).await;
        let through = registered.is_some();
        drop(registered);
        stage.gone().await;
        through.then_some(())
    })
    .await;
}

pub(super) async fn dropped_update_keeps_the_registration() {
    every_cut(async |stage, knife| {
        let registration = stage.registration().await;
        let updated = knife.of(registration.update(|instance| instance.weight = 7)).await;
        assert!(stage.is_registered().await);
        registration.update(|instance| instance.weight = 8).await.unwrap();
        assert_eq!(registration.instance().weight, 8);
        registration.deregister().await.unwrap();
        stage.gone().await;
        updated?.unwrap();
        Some(())
    })
    .await;
}

pub(super) async fn dropped_deregister_goes_on() {
    every_cut(async |stage, knife| {
        let registration = stage.registration().await;
        let deregistered = knife.of(registration.deregister()).await;
        drop(registration);
        stage.gone().await;
        deregistered?.unwrap();
        Some(())
    })
    .await;
}

pub(super) async fn dropped_drain_deregisters() {
    every_cut(async |stage, knife| {
        let registration = stage.registration().await;
        let drained = knife.of(registration.drain(Duration::from_millis(1))).await;
        drop(registration);
        stage.gone().await;
        drained?.unwrap();
        Some(())
    })
    .await;
}

pub(super) async fn dropped_superseded_does_nothing() {
    every_cut(async |stage, knife| {
        let registration = stage.registration().await;
        let foreign = async {
            let key = stage.scope.key("services/service/10.0.0.1:80");
            stage.scope.client().put(key, "{}", None).await.unwrap();
            std::future::pending::<()>().await;
        };
        let superseded = knife.during(registration.superseded(), foreign).await;
        drop(registration);
        let key = stage.scope.key("services/service/10.0.0.1:80");
        stage.scope.client().delete(key, None).await.unwrap();
        stage.gone().await;
        superseded
    })
    .await;
}

pub(super) async fn dropped_open_of_a_discovery() {
    every_cut(async |stage, knife| {
        let discovery = knife.of(stage.services().discover("service").open()).await;
        assert!(discovery?.unwrap().snapshot().instances.is_empty());
        Some(())
    })
    .await;
}

pub(super) async fn dropped_ready_of_a_discovery() {
    every_cut(async |stage, knife| {
        let (discovery, registration) = (stage.discovery().await, stage.registration().await);
        let ready = knife.of(discovery.ready()).await;
        discovery.ready().await.unwrap();
        drop(registration);
        stage.gone().await;
        ready?.unwrap();
        Some(())
    })
    .await;
}

pub(super) async fn dropped_next_change_of_a_discovery_is_not_lost() {
    every_cut(async |stage, knife| {
        let discovery = stage.discovery().await;
        let mut changes = discovery.changes();
        let registration = stage.registration().await;
        let cut = knife.of(changes.next()).await;
        if cut.is_none() {
            assert!(changes.next().await.is_some());
        }
        drop(registration);
        stage.gone().await;
        cut.map(|_| ())
    })
    .await;
}
