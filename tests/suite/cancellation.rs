//! Cancellation: the future of every public async method is dropped after each of its polls, in turn. Each time no key,
//! no lease and no task is left, and the next contender has its turn at once while the session lives on.

mod configs;
mod elections;
mod enter;
mod guards;
mod locks;
mod queues;
mod services;
mod sessions;
mod sources;
mod stage;

/// The table: every public async method, and how it is tried. Each name on the right is a test.
macro_rules! table {
    ($($method:literal: $($module:ident::$test:ident),+;)+) => {
        /// The methods in the table.
        const METHODS: &[&str] = &[$($method),+];
        $($(#[tokio::test]
        async fn $test() {
            $module::$test().await;
        })+)+
    };
}

table! {
    "Session::connect": sessions::dropped_connect_leaves_no_lease;
    "Session::with_client": sessions::dropped_with_client_leaves_no_lease;
    "SessionBuilder::connect": sessions::dropped_builder_leaves_no_lease,
        sessions::dropped_builder_with_a_thread_leaves_no_lease;
    "Session::beside": sessions::dropped_beside_leaves_no_lease;
    "Session::close": sessions::dropped_close_closes;

    "Mutex::lock": locks::dropped_lock_of_a_free_name,
        locks::dropped_lock_behind_a_foreign_holder,
        locks::dropped_lock_behind_a_holder_of_its_session,
        locks::dropped_lock_behind_a_holder_of_another_session,
        locks::dropped_lock_far_back_in_a_long_line,
        locks::dropped_lock_that_loses_its_lease;
    "Mutex::try_lock": locks::dropped_try_lock_of_a_free_name,
        locks::dropped_try_lock_of_a_held_name;
    "Mutex::holder": locks::dropped_holder;
    "Mutex::waiters": locks::dropped_waiters;

    "MutexGuard::unlock": guards::dropped_unlock_releases,
        guards::dropped_unlock_hands_over_in_its_session,
        guards::dropped_unlock_hands_over_to_another_session;
    "MutexGuard::txn": guards::dropped_txn_commits_once_at_most;
    "MutexGuard::run": guards::dropped_run_keeps_the_lock;
    "MutexGuard::lost": guards::dropped_lost_does_nothing;

    "Election::campaign": elections::dropped_campaign_in_an_empty_election,
        elections::dropped_campaign_behind_a_foreign_leader,
        elections::dropped_campaign_behind_a_leader_of_its_session,
        elections::dropped_campaign_far_back_in_a_long_line,
        elections::dropped_campaign_that_loses_its_lease;
    "Election::leader": elections::dropped_leader;
    "Election::candidates": elections::dropped_candidates;
    "Election::observe": elections::dropped_next_observation_is_not_lost;
    "Election::resume": elections::dropped_resume_stays_detached;

    "Leadership::resign": elections::dropped_resign_ends_the_leadership;
    "Leadership::proclaim": elections::dropped_proclaim_goes_on;
    "Leadership::txn": elections::dropped_txn_of_a_leader_commits_once_at_most;
    "Leadership::run": elections::dropped_run_of_a_leader_keeps_leading;
    "Leadership::lost": elections::dropped_lost_of_a_leader_does_nothing;

    "Queue::enqueue": queues::dropped_enqueue_puts_once_at_most,
        queues::dropped_enqueue_of_a_bounded_queue;
    "Queue::try_enqueue": queues::dropped_try_enqueue_puts_once_at_most;
    "Queue::enqueue_all": queues::dropped_enqueue_all_puts_all_or_none;
    "Queue::enqueue_once": queues::dropped_enqueue_once_puts_once_at_most;
    "Queue::dequeue": queues::dropped_dequeue_keeps_the_item_for_the_next_call,
        queues::dropped_dequeue_with_its_queue_puts_the_item_back,
        queues::dropped_dequeue_of_an_empty_queue;
    "Queue::try_dequeue": queues::dropped_try_dequeue_loses_nothing;
    "Queue::claim": queues::dropped_claim_leaves_no_claim_and_counts_no_attempt;
    "Queue::length": queues::dropped_length;
    "Queue::peek": queues::dropped_peek;
    "Queue::dead_letters": queues::dropped_dead_letters;
    "Queue::requeue": queues::dropped_requeue_moves_or_leaves;
    "Queue::purge": queues::dropped_purge_deletes_or_leaves;
    "Claim::lost": queues::dropped_lost_of_a_claim_does_nothing;
    "Claim::ack": queues::dropped_ack_acks_or_gives_back;
    "Claim::ack_with": queues::dropped_ack_with_does_both_or_neither;
    "Claim::txn": queues::dropped_txn_of_a_claim_commits_once_at_most;
    "Claim::release": queues::dropped_release_gives_back,
        queues::dropped_release_with_a_delay_gives_back;
    "Claim::reject": queues::dropped_reject_gives_up_or_gives_back;
    "TypedQueue::enqueue": queues::dropped_enqueue_on_a_typed_queue;
    "TypedQueue::enqueue_all": queues::dropped_enqueue_all_on_a_typed_queue;
    "TypedQueue::claim": queues::dropped_claim_on_a_typed_queue;
    "TypedQueue::dequeue": queues::dropped_dequeue_on_a_typed_queue;

    "ConfigCache::open": configs::dropped_open_of_a_config;
    "ConfigCache::changes": configs::dropped_next_change_is_not_lost;
    "ConfigCache::ready": configs::dropped_ready_of_a_config;
    "ConfigCache::wait_for": configs::dropped_wait_for_a_revision;
    "ConfigCache::publish": configs::dropped_publish_goes_on_or_ends;
    "ConfigCache::publish_as": configs::dropped_publish_of_a_type;
    "ConfigCache::publish_if": configs::dropped_publish_with_a_condition;
    "ConfigCache::delete": configs::dropped_delete_of_a_key;
    "ConfigCache::delete_if": configs::dropped_delete_with_a_condition;

    "Services::register": services::dropped_register_is_undone;
    "Registration::update": services::dropped_update_keeps_the_registration;
    "Registration::deregister": services::dropped_deregister_goes_on;
    "Registration::drain": services::dropped_drain_deregisters;
    "Registration::superseded": services::dropped_superseded_does_nothing;
    "DiscoveryBuilder::open": services::dropped_open_of_a_discovery;
    "Discovery::ready": services::dropped_ready_of_a_discovery;
    "Discovery::changes": services::dropped_next_change_of_a_discovery_is_not_lost;
}

#[test]
fn every_public_async_method_is_in_the_table() {
    let mut found = sources::async_methods();
    found.sort();
    let mut listed = METHODS.to_vec();
    listed.sort_unstable();
    assert_eq!(found, listed, "left: the sources; right: the table in tests/suite/cancellation.rs");
}
