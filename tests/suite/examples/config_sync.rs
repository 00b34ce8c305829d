//! `config_sync`: a file, a command and HTTP that follow a prefix.

use std::path::Path;

use etcd_client::DeleteOptions;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Program, example};
use crate::support::check::{Scope, eventually, scoped};
use crate::support::server::PATIENCE;

fn entries(file: &Path) -> Option<Value> {
    let text = std::fs::read(file).ok()?;
    let shown: Value = serde_json::from_slice(&text).expect("half a file");
    Some(shown["entries"].clone())
}

async fn put(scope: &Scope, key: &str, value: &str) -> i64 {
    let answer = scope.client().put(scope.key(key), value, None).await.unwrap();
    answer.header().unwrap().revision()
}

async fn wipe(scope: &Scope) {
    scope.client().delete(scope.name(), Some(DeleteOptions::new().with_prefix())).await.unwrap();
}

async fn http(address: &str, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn file_command_and_http_follow_the_prefix() {
    scoped(async |scope| {
        let folder = tempfile::tempdir().unwrap();
        let (file, log) = (folder.path().join("out.json"), folder.path().join("log"));
        let first = put(scope, "level", "info").await;
        let mut command = example("config_sync", scope.endpoint());
        command.arg(format!("{}/", scope.name())).arg("--file").arg(&file).args(["--http", "127.0.0.1:0"]);
        command.args(["--", "sh", "-c", &format!("echo $CONFIG_REVISION >> {}; exit 3", log.display())]);
        let mut sync = Program::start(command);
        let address = sync.line("listening ").await;
        assert!(sync.line("synced revision=").await.ends_with("keys=1"));
        assert_eq!(entries(&file).unwrap()["level"]["value"], "info");
        assert_eq!(entries(&file).unwrap()["level"]["revision"], first);
        sync.line("config_sync: sh failed: exit status: 3").await;

        let second = put(scope, "level", "debug").await;
        put(scope, "limits", "{}").await;
        eventually(PATIENCE, "the file follows", async || {
            entries(&file).is_some_and(|e| e["level"]["value"] == "debug" && e["limits"]["value"] == "{}")
        })
        .await;
        eventually(PATIENCE, "the command ran", async || {
            std::fs::read_to_string(&log)
                .unwrap_or_default()
                .lines()
                .any(|line| line.parse::<i64>().unwrap() >= second)
        })
        .await;
        let answer = http(&address, "/").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("config-stale: 0"), "{answer}");
        let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(body["entries"]["level"]["value"], "debug");
        assert!(http(&address, "/?key=level").await.ends_with("\r\n\r\ndebug"));
        assert!(http(&address, "/?key=nothing").await.starts_with("HTTP/1.1 404"));

        scope.client().delete(scope.key("level"), None).await.unwrap();
        eventually(PATIENCE, "the file follows", async || {
            entries(&file).is_some_and(|entries| entries.get("level").is_none())
        })
        .await;
        sync.signal(Signal::SIGTERM);
        assert_eq!(sync.code().await, 0);
        wipe(scope).await;
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_done_is_said() {
    scoped(async |scope| {
        let mut nowhere = example("config_sync", scope.endpoint());
        nowhere.args([scope.name(), "--file", "/nowhere/out.json"]);
        let mut sync = Program::start(nowhere);
        sync.line("config_sync: cannot write /nowhere/out.json").await;
        assert_eq!(sync.code().await, 1);
        let mut empty = Program::start({
            let mut command = example("config_sync", scope.endpoint());
            command.arg("/");
            command
        });
        empty.line("config_sync: the name \"\" cannot be used").await;
        assert_eq!(empty.code().await, 1);
        let mut unknown = Program::start({
            let mut command = example("config_sync", scope.endpoint());
            command.arg("--unknown");
            command
        });
        assert_eq!(unknown.code().await, 2);
    })
    .await;
}
