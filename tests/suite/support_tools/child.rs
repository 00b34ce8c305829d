//! Children talk, stand still, and die with their parent.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::support::check::eventually;
use crate::support::child::{Child, role};
use crate::support::process::ended_by;
use crate::support::server::PATIENCE;

const BODY: &str = "support_tools::child::body";

/// Not a test: the body of the children here.
#[tokio::test]
#[ignore = "runs in a child process"]
async fn body() {
    let Some(mut role) = role() else { return };
    role.say(format!("hello {}", role.variable("WHO")));
    loop {
        match role.hear().await.as_str() {
            "end" => return,
            "fail" => std::process::exit(7),
            // In one write: who hears the first can be sure of the second.
            "two" => role.say("one\n@@ two"),
            "nest" => {
                let nested = Child::spawn(BODY, &[("WHO", "nested")]);
                role.say(nested.id().to_string());
                std::mem::forget(nested);
            }
            other => role.say(format!("echo {other}")),
        }
    }
}

async fn child() -> Child {
    let mut child = Child::spawn(BODY, &[("WHO", "parent")]);
    child.expect("hello parent").await;
    child
}

#[tokio::test]
async fn talks_and_ends() {
    let mut talker = child().await;
    talker.tell("a line");
    talker.expect("echo a line").await;
    assert!(talker.said().is_empty());
    talker.tell("end");
    assert!(talker.wait().await.success());
}

#[tokio::test]
async fn what_a_killed_one_said_is_heard() {
    let mut talker = child().await;
    talker.tell("two");
    talker.expect("one").await;
    assert_eq!(talker.kill().await, ["two"]);
}

#[tokio::test]
async fn tells_how_it_failed() {
    let mut failing = child().await;
    failing.tell("fail");
    assert_eq!(failing.wait().await.code(), Some(7));
}

#[tokio::test]
async fn stands_still_while_paused() {
    let mut paused = child().await;
    paused.pause();
    paused.tell("a line");
    assert!(tokio::time::timeout(Duration::from_millis(150), paused.line()).await.is_err());
    paused.resume();
    paused.expect("echo a line").await;
    paused.pause();
    paused.kill().await;
}

/// The watchdog kills what a killed process had started, also when that stands still.
#[tokio::test]
async fn dies_with_its_parent() {
    let mut parent = child().await;
    parent.tell("nest");
    let nested: i32 = parent.line().await.parse().unwrap();
    let nested = nix::unistd::Pid::from_raw(nested);
    nix::sys::signal::kill(nested, Signal::SIGSTOP).unwrap();
    parent.kill().await;
    eventually(PATIENCE, "the nested child is gone", async || {
        // A zombie that nobody waits for is gone as well.
        let stat = std::fs::read_to_string(format!("/proc/{nested}/stat")).unwrap_or_default();
        nix::sys::signal::kill(nested, None).is_err() || stat.contains(") Z ")
    })
    .await;
}

#[tokio::test]
async fn a_signal_is_told_from_an_end() {
    let mut killed = child().await;
    let id = nix::unistd::Pid::from_raw(i32::try_from(killed.id()).unwrap());
    killed.tell("a line");
    killed.expect("echo a line").await;
    nix::sys::signal::kill(id, Signal::SIGKILL).unwrap();
    assert!(ended_by(killed.wait().await, Signal::SIGKILL));
}
