"""Training runs: ``fastgist finetune`` (:mod:`fastgist.train.finetune`) and ``fastgist demo``
(:mod:`fastgist.train.demo`) over one loop (:mod:`fastgist.train.engine`)."""
