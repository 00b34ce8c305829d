//! Servers and clusters: the chosen version, their life cycle, what they tell.

use std::time::Duration;

use etcd_client::Client;

use crate::support::binaries::binaries;
use crate::support::check::eventually;
use crate::support::cluster::Cluster;
use crate::support::needs::{Needs, lacking};
use crate::support::server::{Options, PATIENCE, Server};
use crate::support::{client, etcd};

/// The value of a key, with patience: after a restart the client's connection comes back on its own.
async fn value(client: &mut Client, key: &str) -> Option<Vec<u8>> {
    let mut found = None;
    eventually(PATIENCE, "the server answers a read", async || {
        let read = tokio::time::timeout(Duration::from_secs(5), client.get(key, None)).await;
        let Ok(Ok(answer)) = read else { return false };
        found = answer.kvs().first().map(|kv| kv.value().to_vec());
        true
    })
    .await;
    found
}

#[tokio::test]
async fn runs_the_chosen_version() {
    let server = etcd();
    let (major, minor, patch) = server.version();
    let answer = server.client().await.status().await.unwrap();
    assert_eq!(answer.version(), format!("{major}.{minor}.{patch}"));
    if let Some(directory) = std::env::var_os("ETCD_RECIPES_ETCD")
        && !binaries().embedded
    {
        let output = std::process::Command::new(std::path::Path::new(&directory).join("etcd"))
            .arg("--version")
            .output()
            .unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains(answer.version()));
    }
}

#[tokio::test]
async fn shared_server_is_one_and_fast() {
    assert_eq!(etcd().endpoint(), etcd().endpoint());
    let mut client = etcd().client().await;
    let lease = client.lease_grant(1, None).await.unwrap();
    assert_eq!(lease.ttl(), 1);
    client.lease_revoke(lease.id()).await.unwrap();
}

#[tokio::test]
async fn default_settings_raise_short_leases() {
    if lacking(Needs::Settings) {
        return;
    }
    let server = Server::start().await;
    let lease = server.client().await.lease_grant(1, None).await.unwrap();
    assert_eq!(lease.ttl(), 2);
    assert!(server.leases().await.contains(&lease.id()));
}

#[tokio::test]
async fn data_survives_stop_kill_and_restart() {
    if lacking(Needs::Disk) {
        return;
    }
    let server = Server::fast().await;
    let mut client = server.client().await;
    client.put("key", "1", None).await.unwrap();
    server.stop().await;
    assert!(client.get("key", None).await.is_err());
    server.restart().await;
    assert_eq!(value(&mut client, "key").await.as_deref(), Some(&b"1"[..]));
    client.put("key", "2", None).await.unwrap();
    server.kill();
    assert!(client.get("key", None).await.is_err());
    server.restart().await;
    assert_eq!(value(&mut client, "key").await.as_deref(), Some(&b"2"[..]));
}

#[tokio::test]
async fn a_paused_server_answers_later() {
    let server = Server::fast().await;
    let mut client = server.client().await;
    client.put("key", "1", None).await.unwrap();
    server.pause();
    let mut writer = client.clone();
    let mut write = tokio::spawn(async move { writer.put("key", "2", None).await });
    let early = tokio::time::timeout(Duration::from_millis(200), &mut write).await;
    assert!(early.is_err(), "a paused server answered");
    server.resume();
    write.await.unwrap().unwrap();
    assert_eq!(value(&mut client, "key").await.as_deref(), Some(&b"2"[..]));
}

#[tokio::test]
async fn dropping_a_paused_server_ends_it() {
    let server = Server::fast().await;
    let port = server.port();
    server.pause();
    drop(server);
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err());
}

#[tokio::test]
async fn etcdctl_compaction_and_metrics() {
    if lacking(Needs::Settings) {
        return;
    }
    let server = Server::with(Options::fast().arg("--max-txn-ops=7")).await;
    server.ctl(["put", "key", "from etcdctl"]).await;
    assert!(server.ctl(["get", "key"]).await.contains("from etcdctl"));

    let mut client = server.client().await;
    let before = server.metrics().await;
    for n in 0..3 {
        client.put("key", n.to_string(), None).await.unwrap();
    }
    let after = server.metrics().await;
    assert_eq!(after.calls("Put") - before.calls("Put"), 3);
    assert_eq!(after.messages_sent("Put") - before.messages_sent("Put"), 3);
    assert_eq!(after.messages_received("Put") - before.messages_received("Put"), 3);
    assert_eq!(after.calls("Txn"), 0);
    assert!(after.text().contains("grpc_server_started_total"));
    assert!(after.value("etcd_server_has_leader").is_some_and(|value| value > 0.5));

    let revision = server.compact().await;
    assert_eq!(server.compact().await, revision);
    let old = etcd_client::GetOptions::new().with_revision(revision - 1);
    let error = client.get("key", Some(old)).await.unwrap_err();
    assert!(error.to_string().contains("compacted"), "{error}");
}

#[tokio::test]
async fn a_cluster_moves_its_leader_and_survives_its_death() {
    if lacking(Needs::Cluster) {
        return;
    }
    let cluster = Cluster::start().await;
    let mut client = client(cluster.endpoints()).await;
    client.put("key", "1", None).await.unwrap();

    let to = (cluster.leader().await + 1) % 3;
    cluster.move_leader(to).await;
    assert_eq!(cluster.leader().await, to);

    cluster.member(to).kill();
    let next = cluster.leader().await;
    assert_ne!(next, to);
    let mut survivor = cluster.member(next).client().await;
    eventually(PATIENCE, "the others take a write", async || survivor.put("key", "2", None).await.is_ok())
        .await;

    cluster.member(to).restart().await;
    cluster.settled().await;
    let mut back = cluster.member(to).client().await;
    assert_eq!(value(&mut back, "key").await.as_deref(), Some(&b"2"[..]));
}
