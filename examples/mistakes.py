from my_agent import MyAgent


class WrongShape(MyAgent):
    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return self.net(obs), memory  # the argmax is missing


class MissingKey(MyAgent):
    def state_dict(self):
        return {"net": dict(self.net.state_dict())}  # and the optimiser?


class NeedsTaskId(MyAgent):
    requires = MyAgent.requires | {"task_id"}  # on a stream that does not reveal it


class RaisesInLearn(MyAgent):
    def learn(self, experience, budget, *, rng):
        yield {"loss": 1 / 0}
