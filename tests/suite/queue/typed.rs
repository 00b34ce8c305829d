//! Typed payloads.

use etcd_recipes::TypedQueue;
use serde::{Deserialize, Serialize};

use super::queue;
use crate::support::check::scoped;
use crate::support::sessions::session;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Mail {
    to: String,
    copies: u32,
}

fn mail(copies: u32) -> Mail {
    Mail { to: "anna".into(), copies }
}

#[tokio::test]
async fn what_does_not_decode_is_given_up_and_the_others_flow() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mails: TypedQueue<Mail> = queue(&session, scope).typed();
        mails.enqueue(&mail(1)).await.unwrap();
        mails.queue().enqueue("{\"to\": 7}").await.unwrap();
        mails.queue().enqueue(b"\xff\0".to_vec()).await.unwrap();
        mails.enqueue_all(&[mail(2), mail(3)]).await.unwrap();

        assert_eq!(mails.dequeue().await.unwrap(), mail(1));
        let claim = mails.claim().await.unwrap();
        assert_eq!(claim.payload(), &mail(2));
        assert!(claim.is_held() && claim.attempt() == 1);
        let (payload, claim) = claim.into_parts();
        assert_eq!(payload, mail(2));
        claim.ack().await.unwrap();
        assert_eq!(mails.clone().dequeue().await.unwrap(), mail(3));

        let letters = mails.queue().dead_letters().await.unwrap();
        let values: Vec<_> = letters.iter().map(|letter| letter.value.as_slice()).collect();
        assert_eq!(values, [&b"{\"to\": 7}"[..], b"\xff\0"]);
        assert!(letters.iter().all(|letter| letter.reason.starts_with("it does not decode")));
        for letter in letters {
            mails.queue().purge(&letter).await.unwrap();
        }
        session.close().await.unwrap();
    })
    .await;
}
