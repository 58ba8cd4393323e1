"""Training of antibody models, of factor networks with them or for them, and the data that they are trained on.

In the order in which they are run, with the modules that do the work:

``scripts/prepare_antibody_data.py OUTPUT --data PATH``
    Reads SAbDab VH domains, CoV-AbDab pairs and Fv crystals (:mod:`~pairformer_fast.training.sources`), drops what
    shares a cluster with a hold-out (:mod:`~pairformer_fast.training.leakage`), lets the teacher predict the pairs
    (:mod:`~pairformer_fast.training.teacher`) and writes shards (:mod:`~pairformer_fast.training.shards`).
    ``--derived N`` adds pairs derived from the known ones: new pairings, exchanged CDRs, mutations
    (:mod:`~pairformer_fast.training.derive`). Hold-outs hold for them, too.
``scripts/predict_antibody_pairs.py pairs.csv.gz OUTPUT``
    After ``prepare_antibody_data.py --table``, which only writes the pairs down: predicts them on a machine with a GPU.
``scripts/train.py --config PRESET --data OUTPUT``
    Trains (:mod:`~pairformer_fast.training.loop`) by a preset of ``configs/`` or a YAML file
    (:mod:`~pairformer_fast.training.settings`), on several GPUs through ``torchrun``. ``--bias learned --rank 16``
    trains factor networks with the model in place of dense biases. ``--config antibody_further --from WEIGHTS`` goes on
    from trained weights (:mod:`~pairformer_fast.training.origin`), ``antibody_loops`` and ``antibody_fv`` from those.
``scripts/calibrate_plddt.py WEIGHTS CALIBRATED --data OUTPUT``
    Fits pLDDT of trained weights to held-out crystals (:mod:`~pairformer_fast.training.calibrate`).
``scripts/distill_factors.py``
    Fits factor networks to trained weights that stay as they are (:mod:`~pairformer_fast.training.distill`).
``scripts/factors_study.py``, ``scripts/compare_training.py``
    Compare the logs of runs (:mod:`~pairformer_fast.training.study`).
"""
