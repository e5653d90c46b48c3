use annals::{Saga, SagaState, saga::StepRequest};

#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct Trip;
impl SagaState for Trip {}

fn ask(_: &Trip) -> StepRequest {
    unreachable!()
}

fn main() {
    Saga::named("trip").compensatable("book hotel", ask).undo(ask).build();
    Saga::named("trip").pivot("pay", ask).build();
    Saga::named("trip").retriable("send tickets", ask).build();
    Saga::named("trip")
        .deadline(std::time::Duration::from_secs(60))
        .compensatable("book hotel", ask)
        .undo(ask)
        .compensatable("book flight", ask)
        .undo(ask)
        .and(ask)
        .undo(ask)
        .timeout(std::time::Duration::from_secs(1))
        .pivot("pay", ask)
        .attempts(3)
        .retriable("send tickets", ask)
        .retriable("send invoice", ask)
        .when_compensated("apologise", ask)
        .build();
    Saga::named("trip").compensatable("book hotel", ask).undo(ask).retriable("send tickets", ask).build();
}
