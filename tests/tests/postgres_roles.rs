//! The permissions of each role, as the database enforces them.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::sync::Arc;

use annals::{
    Commit, CommitError, DocumentKey, EventStore, LocalBus, LogQuery, Operator, Position, Put, Runtime, Service,
    Subscription, archive::Archive, health::State,
};
use annals_postgres::{OpenError, PostgresStore, Replay};
use annals_tests::tally::{Copier, add, copied, eventually};
use futures::TryStreamExt;
use sqlx::{AssertSqlSafe, PgConnection};
use tokio::time::timeout;

use self::postgres::{PROMPTLY, Schema, append, url, whole_log};

const INSUFFICIENT_PRIVILEGE: &str = "42501";
const NEVER_CHANGED: &str = "AN002";

/// Statements, and whether each role may run them: reader, operator, writer.
const RIGHTS: &[(&str, [bool; 3])] = &[
    ("SELECT count(*) FROM annals.events", [true, true, true]),
    ("SELECT count(*) FROM annals.documents", [true, true, true]),
    ("SELECT count(*) FROM annals.sagas", [true, true, true]),
    ("SELECT count(*) FROM annals.checkpoints", [true, true, true]),
    ("SELECT count(*) FROM annals.dead_letters", [true, true, true]),
    ("INSERT INTO annals.documents (collection, id, version, body) VALUES ('note', '2', 1, '1')", [false, true, true]),
    ("UPDATE annals.documents SET version = version + 1", [false, true, true]),
    ("DELETE FROM annals.documents", [false, true, true]),
    (
        "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data)
         VALUES ('hand-1', 1, gen_random_uuid(), 'by.hand', 1, '{}')",
        [false, false, true],
    ),
    ("SELECT nextval('annals.events_position')", [false, false, true]),
    ("SELECT setval('annals.events_position', 1)", [false, false, false]),
    ("INSERT INTO annals.migrations (version) VALUES (99)", [false, false, false]),
    ("DROP TABLE annals.documents", [false, false, false]),
    ("ALTER TABLE annals.events DISABLE TRIGGER ALL", [false, false, false]),
    ("SELECT annals.grant_access('postgres', 'writer')", [false, false, false]),
    ("SELECT annals.advance(), annals.drawn()", [true, true, true]),
    ("COPY annals.documents FROM PROGRAM 'true'", [false, false, false]),
    ("TRUNCATE annals.documents", [false, false, false]),
    ("UPDATE annals.migrations SET version = 99", [false, false, false]),
    // Statements that would block all sessions, or would run with another role's permissions.
    ("LOCK TABLE annals.events IN ACCESS EXCLUSIVE MODE", [false, false, false]),
    ("CREATE TABLE annals.mine ()", [false, false, false]),
    (
        "CREATE TRIGGER mine BEFORE INSERT ON annals.events EXECUTE FUNCTION annals.refuse_change()",
        [false, false, false],
    ),
    (
        "CREATE OR REPLACE FUNCTION annals.drawn() RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'",
        [false, false, false],
    ),
    ("SET session_replication_role = replica", [false, false, false]),
];

async fn execute(connection: &mut PgConnection, sql: &str) -> Result<(), String> {
    let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await;
    done.map(drop).map_err(|error| error.into_database_error().unwrap().code().unwrap().into_owned())
}

/// Creates one role of each kind.
async fn roles(schema: &Schema) -> [String; 3] {
    let roles = ["reader", "operator", "writer"].map(|access| (access, schema.role(access)));
    for (access, role) in &roles {
        let grant = schema.sql(&format!("SELECT annals.grant_access('{role}', '{access}')")).0;
        let mut owner = schema.connection().await;
        execute(&mut owner, &format!("CREATE ROLE {role}; {grant}; {grant}")).await.unwrap();
    }
    roles.map(|(_, role)| role)
}

/// Returns a URL whose sessions run as this role.
fn url_as(role: &str) -> String {
    let url = url();
    let separator = if url.contains('?') { '&' } else { '?' };
    format!("{url}{separator}options=-c%20role%3D{role}")
}

fn note(expected: i64) -> Commit {
    let key = DocumentKey::new("note", "1");
    Commit { appends: Vec::new(), puts: vec![Put { key, expected: Some(expected), body: Some("1".into()), due: None }] }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_has_only_its_permissions() {
    let schema = Schema::new();
    let store = schema.store().await;
    store.commit(append("a-1", 0, 2)).await.unwrap();
    store.commit(note(0)).await.unwrap();
    for (place, role) in roles(&schema).await.iter().enumerate() {
        for &(sql, may) in RIGHTS {
            let mut connection = schema.connection().await;
            execute(&mut connection, &format!("BEGIN; SET LOCAL ROLE {role}")).await.unwrap();
            let done = execute(&mut connection, &schema.sql(sql).0).await;
            match done {
                Ok(()) => assert!(may[place], "{role} must not: {sql}"),
                Err(code) => assert_eq!((&*code, may[place]), (INSUFFICIENT_PRIVILEGE, false), "{role}: {sql}"),
            }
        }
        // No role can change an event. The permissions forbid the change, and a trigger refuses it even from the owner.
        for sql in
            ["UPDATE annals.events SET data = '[]'", "DELETE FROM annals.events", "TRUNCATE annals.events CASCADE"]
        {
            let mut connection = schema.connection().await;
            execute(&mut connection, &format!("SET ROLE {role}")).await.unwrap();
            assert_eq!(execute(&mut connection, &schema.sql(sql).0).await.unwrap_err(), INSUFFICIENT_PRIVILEGE);
            execute(&mut connection, "RESET ROLE").await.unwrap();
            assert_eq!(execute(&mut connection, &schema.sql(sql).0).await.unwrap_err(), NEVER_CHANGED);
        }
    }
    assert_eq!(whole_log(&store).await.len(), 2);
}

/// A service runs as a writer, a person on call repairs as an operator, and a report reads as a reader.
#[tokio::test(flavor = "multi_thread")]
async fn each_role_can_do_its_whole_job() {
    let schema = Schema::new();
    schema.store().await.close().await.unwrap();
    let [reader, operator, writer] = roles(&schema).await;
    let open = async |role: &str| PostgresStore::connect_existing(&url_as(role), schema.settings()).await.unwrap();

    let service: Arc<dyn EventStore> = Arc::new(open(&writer).await);
    let mut runtime = Runtime::shared("service");
    let copies =
        Subscription::new("copies", Copier::new(service.clone())).query(LogQuery::categories(["tally"])).lanes(2);
    runtime
        .start(vec![Service::new("tallies", service.clone()).subscribe(copies)], Arc::new(LocalBus::default()))
        .await
        .unwrap();
    add(&service, "a", [1, 2]).await;
    let copied_are = async |amounts: &[i64]| {
        eventually(&format!("{amounts:?} are copied"), async || {
            let found = service.documents(&[copied("a")]).await.unwrap().remove(0)?;
            let found: Vec<i64> = serde_json::from_str(&found.body).unwrap();
            (found == amounts).then_some(())
        })
        .await;
    };
    copied_are(&[1, 2]).await;

    let desk: Arc<dyn EventStore> = Arc::new(open(&operator).await);
    let desk = Operator::new(desk, "ann");
    desk.pause("copies", true, "the disk is changed").await.unwrap();
    let stopped = || runtime.health().parts().values().any(|part| matches!(part, State::Elsewhere(_)));
    eventually("the lanes stop", async || stopped().then_some(())).await;
    add(&service, "a", [3]).await;
    desk.pause("copies", false, "it was").await.unwrap();
    copied_are(&[1, 2, 3]).await;

    let report = open(&reader).await;
    let replayed: Vec<_> = report.replay(Replay::all()).try_collect().await.unwrap();
    let log = whole_log(&report).await;
    assert!(replayed.iter().eq(log.iter().map(|event| &**event)));
    assert!(report.streams("", 100).await.unwrap().iter().any(|stream| stream.stream.as_str() == "tally-a"));
    let head = report.status().await.unwrap().head;
    let waiting = report.wait(head);
    add(&service, "b", [4]).await;
    timeout(PROMPTLY, waiting).await.expect("it hears of it").unwrap();
    let refused = Operator::new(Arc::new(report), "bob").pause("copies", true, "I may not").await;
    assert!(refused.is_err(), "{refused:?}");
    runtime.drain(PROMPTLY).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn store_works_within_the_permissions_of_its_role() {
    let schema = Schema::new();
    schema.store().await.commit(append("a-1", 0, 2)).await.unwrap();
    let [reader, operator, writer] = roles(&schema).await;
    let open = async |role: &str| PostgresStore::connect(&url_as(role), schema.settings()).await;

    let store = open(&writer).await.unwrap();
    store.commit(append("a-1", 2, 2)).await.unwrap();
    store.commit(note(0)).await.unwrap();
    // After a restore, the sequence can be lower than the last position. Every role that writes moves the sequence
    // forward, even if the role may not set it directly.
    let back = schema.sql("SELECT setval('annals.events_position', 1)");
    sqlx::query(back).execute(&mut schema.connection().await).await.unwrap();
    store.commit(append("a-1", 4, 1)).await.unwrap();
    assert_eq!(store.status().await.unwrap().head, Position(5));

    let store = open(&operator).await.unwrap();
    store.commit(note(1)).await.unwrap();
    for stream in ["a-1", "operator-a"] {
        let outcome = store.commit(append(stream, if stream == "a-1" { 5 } else { 0 }, 1)).await;
        assert!(matches!(outcome, Err(CommitError::Unavailable(_))), "{outcome:?}");
    }
    assert_eq!(whole_log(&store).await.len(), 5);
    // An operator may record its own actions.
    let mut act = append("operator-a", 0, 1);
    act.appends[0].events[0].type_name = "operator.paused".into();
    store.commit(act.clone()).await.unwrap();
    act.appends[0].stream = annals::StreamId::parse("a-2").unwrap();
    let outcome = store.commit(act).await;
    assert!(matches!(outcome, Err(CommitError::Unavailable(_))), "{outcome:?}");
    assert_eq!(whole_log(&store).await.len(), 6);

    let store = open(&reader).await.unwrap();
    let outcome = store.commit(note(2)).await;
    assert!(matches!(outcome, Err(CommitError::Unavailable(_))), "{outcome:?}");
    assert_eq!(
        store.read_log(&LogQuery::types(["thing.happened"]), Position::START, 10).await.unwrap().events.len(),
        5
    );
    store.wait(Position(5)).await.unwrap();
    assert_eq!(store.status().await.unwrap().head, Position(6));

    // This role has no grants.
    let stranger = schema.role("stranger");
    execute(&mut schema.connection().await, &format!("CREATE ROLE {stranger}")).await.unwrap();
    let refused = open(&stranger).await.unwrap_err();
    assert!(matches!(refused, OpenError::Refused { .. }), "{refused}");
}

/// The rows decide whether an operator may append them, no matter what the lower bounds of the array arguments are.
#[tokio::test(flavor = "multi_thread")]
async fn operator_role_cannot_exceed_documented_permissions() {
    let schema = Schema::new();
    schema.store().await.close().await.unwrap();
    let [_, operator, _] = roles(&schema).await;
    let operate = |ranks: &str, ids: &str| {
        let sql = format!(
            "SET LOCAL ROLE {operator}; SELECT annals.operate(
                 '{{saga.a-1,operator-1}}', '{{NULL,NULL}}', '{{f,f}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}',
                 '{ranks}', '{ranks}', '{{saga.a-1,operator-1}}', '{{1,1}}', ARRAY[{ids}],
                 '[0:1]={{saga.requested,operator.x}}', '{{1,1}}', '{{\"{{}}\",\"{{}}\"}}', '{{\"{{}}\",\"{{}}\"}}')"
        );
        schema.sql(&sql).0
    };
    let mut connection = schema.connection().await;
    let one = operate("{1}", "gen_random_uuid()");
    assert!(execute(&mut connection, &format!("BEGIN; {one}")).await.is_err(), "one of the two has no rank");
    execute(&mut connection, "ROLLBACK").await.unwrap();
    let both = operate("{1,2}", "gen_random_uuid(), gen_random_uuid()");
    execute(&mut connection, &format!("BEGIN; {both}; COMMIT")).await.unwrap();
    let written = schema.sql("SELECT stream_id || ' ' || type FROM annals.events ORDER BY 1");
    let written: Vec<String> = sqlx::query_scalar(written).fetch_all(&mut connection).await.unwrap();
    assert_eq!(written, ["operator-1 operator.x", "saga.a-1 saga.requested"]);
}
